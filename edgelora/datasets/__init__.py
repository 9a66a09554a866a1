"""A dataset as examples, its parts, and the template that turns an example into text."""

from edgelora.datasets.read import read_dataset
from edgelora.datasets.records import Dataset, Example, Message
from edgelora.datasets.split import Split, split_examples

__all__ = ["Dataset", "Example", "Message", "Split", "read_dataset", "split_examples"]
