"""The two private parts of Ray that a fleet uses, with a fallback if Ray has changed them.

- `ray._private.state.available_resources_per_node`: the free resources of every node. Ray's public
  `ray.available_resources` has only their sum, but a run must fit on a single node.
- `ray._private.ray_logging.global_worker_stdstream_dispatcher`: the lines that worker processes
  print, before Ray puts a prefix of its own in front of them.
"""

import importlib
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

import ray

_log = logging.getLogger(__name__)

FreeByNode = Callable[[], Mapping[str, Mapping[str, float]]]
Batch = Mapping[str, Any]


def find_free_by_node() -> FreeByNode | None:
    """Return Ray's function for the free resources of every node; None if Ray has changed it.

    Without it a fleet counts only its own runs. In a cluster with other users its runs may then
    wait in Ray's queue and are given back, which is slower but fails no run.
    """
    function = _find_part("ray._private.state", "available_resources_per_node")
    if function is not None and _list_parameters(function) == []:
        return function
    _warn_of_fallback(
        "available_resources_per_node", "this fleet does not see the tasks of others in the cluster"
    )
    return None


def forward_worker_lines(forward: Callable[[Batch], None]) -> None:
    """Call `forward` with the lines of worker processes, and stop Ray from printing them.

    Without this part of Ray, Ray goes on to print the lines, with a prefix in front of each.
    """
    dispatcher = _find_part("ray._private.ray_logging", "global_worker_stdstream_dispatcher")
    remove = getattr(dispatcher, "remove_handler", None)
    add = getattr(dispatcher, "add_handler", None)
    if _list_parameters(remove) == ["name"] and _list_parameters(add) == ["name", "handler"]:
        assert remove is not None
        assert add is not None
        remove("ray_print_logs")
        add("warmscale", forward)
    else:
        _warn_of_fallback(
            "global_worker_stdstream_dispatcher", "Ray prints workers' lines with its own prefix"
        )


def _find_part(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def _list_parameters(function: Any) -> list[str] | None:
    """Return the names of a function's parameters; None if it is not callable."""
    return [*inspect.signature(function).parameters] if callable(function) else None


def _warn_of_fallback(name: str, effect: str) -> None:
    works = "pip install 'ray[train]==2.60.*'"
    more = {"part": name, "found": ray.__version__, "effect": effect, "works": works}
    _log.warning("this Ray has other private parts", extra=more)
