"use strict";
// The slider: one panel of answers a method, the one nearest to the chosen distance. All panels are in the page already.
(() => {
  document.documentElement.classList.add("js");
  const slider = document.getElementById("kl");
  if (!slider) return;
  const answers = document.getElementById("answers");
  const pictures = [...document.querySelectorAll("svg.picture")];
  const panels = [...document.querySelectorAll(".panel")].map((node) => ({
    node, method: node.dataset.method, x: Number(node.dataset.x), told: node.dataset.told,
  }));
  const names = [...new Set(panels.map((panel) => panel.method))];
  const of = (name) => panels.filter((panel) => panel.method === name);
  const nearest = (list, x) => list.reduce((best, one) => (Math.abs(one.x - x) < Math.abs(best.x - x) ? one : best));
  const chosenMethod = () => document.querySelector("input[name=method]:checked")?.value ?? "";
  // A comparison of all methods keeps the slider where it is; one method's slider rests on that method's own points.
  const stops = () => {
    const list = chosenMethod() ? of(chosenMethod()) : panels;
    return [...new Set(list.map((panel) => panel.x))].sort((a, b) => a - b);
  };

  function show(x, settle) {
    const method = chosenMethod();
    const chosen = (method ? [method] : names).map((name) => nearest(of(name), x));
    for (const panel of panels) {
      panel.node.classList.toggle("on", chosen.includes(panel));
      panel.node.classList.toggle("again", chosen.indexOf(panel) > 0);  // the prompts stand above already
    }
    const at = method ? chosen[0].x : x;
    if (settle) slider.value = String(at);
    slider.setAttribute("aria-valuetext", chosen.map((panel) => panel.told).join("; "));
    for (const svg of pictures) {
      const { low, high, left, right } = svg.dataset;
      const place = Number(left) + ((at - low) / (high - low)) * (right - left);
      const cursor = svg.querySelector(".cursor");
      cursor.setAttribute("x1", place);
      cursor.setAttribute("x2", place);
      cursor.classList.toggle("here", at <= high);
      svg.classList.toggle("one", method !== "");
      for (const curve of svg.querySelectorAll("[data-method]")) {
        curve.classList.toggle("on", curve.dataset.method === method);
      }
    }
  }

  slider.addEventListener("input", () => show(Number(slider.value), false));
  slider.addEventListener("change", () => show(Number(slider.value), true));
  slider.addEventListener("keydown", (event) => {
    const all = stops();
    const here = Number(slider.value);
    const last = all.length - 1;
    const after = all.findIndex((x) => x > here + 1e-6);
    const before = all.findLastIndex((x) => x < here - 1e-6);
    const next = after < 0 ? last : after;
    const back = Math.max(before, 0);
    const to = {
      ArrowRight: next, ArrowUp: next, ArrowLeft: back, ArrowDown: back, Home: 0, End: last,
      PageUp: Math.min(next + 2, last), PageDown: Math.max(back - 2, 0),
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    slider.value = String(all[to]);
    show(all[to], true);
  });
  for (const radio of document.querySelectorAll("input[name=method]")) {
    radio.addEventListener("change", () => show(Number(slider.value), true));
  }
  for (const radio of document.querySelectorAll("input[name=shade]")) {
    radio.addEventListener("change", () => { answers.className = `shade-${radio.value}`; });
  }
  for (const svg of pictures) {
    svg.addEventListener("click", (event) => {
      const { low, high, left, right, width } = svg.dataset;
      const frame = svg.getBoundingClientRect();
      const share = (((event.clientX - frame.left) / frame.width) * width - left) / (right - left);
      const x = Math.min(Math.max(Number(low) + share * (high - low), 0), Number(slider.max));
      slider.value = String(x);
      show(x, true);
    });
  }
  show(Number(slider.value), true);
})();
