"""YAML from strangers: plain data only, and no larger than it looks.

An alias repeats what its anchor names. A few lines of aliases of aliases mean billions of values ("billion laughs"),
which cost nothing until something walks over them; so values are counted with every repetition before any is made.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from compressor.files import read_bounded

MAX_BYTES = 256 << 10
"""A recipe is a page of text; a parser in pure Python takes seconds for a file of this size."""

MAX_VALUES = 50_000
"""Values a document may have once aliases are spelled out."""


def parse_yaml(text: str) -> object:
    """Return the plain data a YAML document stands for (JSON is YAML); tags that make other objects are refused.

    Raises:
        ValueError: Not YAML, nested too deeply, or too many values; the message is one line.
    """
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if (count := _count(node, {})) > MAX_VALUES:
            raise ValueError(f"its aliases stand for {count} values, at most {MAX_VALUES} are read")
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError:
        raise
    except Exception as error:  # PyYAML lets KeyError and the like through where a tag does not fit its value
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    finally:
        if loader is not None:
            loader.dispose()


def read_yaml(path: Path) -> object:
    """Return what a YAML file says.

    Raises:
        OSError: It cannot be read.
        ValueError: Too large, not UTF-8, or as `parse_yaml`.
    """
    return parse_yaml(read_bounded(path, MAX_BYTES))


def _count(node: yaml.Node, counts: dict[int, int]) -> int:
    """Count the values below a node, those behind aliases as often as they appear."""
    if id(node) in counts:
        if not counts[id(node)]:
            raise ValueError("an alias names the value it lies in")
        return counts[id(node)]
    counts[id(node)] = 0
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        parts = node.value
    elif isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    counts[id(node)] = total = 1 + sum(_count(part, counts) for part in parts)
    return total
