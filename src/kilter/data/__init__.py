"""Records from files, and token ids from records: readers, public layouts, chat spans, checks, splits, filters."""

from kilter.data.chat import ChatEncoder, Encoded
from kilter.data.reader import ReadResult, Skipped, layouts, read, write

__all__ = ["ChatEncoder", "Encoded", "ReadResult", "Skipped", "layouts", "read", "write"]
