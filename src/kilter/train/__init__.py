"""Training: one loop, and what a method gives it: an objective and a source of batches.

`loop` holds the only `backward`; `objectives` turns a trunk and a batch into sums by name; `sources` makes groups from
records and batches from groups; `optimizer`, `checkpoint` and `distributed` do what their names say; `checks` refuses a
set-up that would train the wrong thing.
"""
