"""What can go wrong on or with a ComfyUI server: a class, a sentence and an exit code for each."""

from __future__ import annotations

from typing import Any

from ..errors import HYWUError


class ServerError(HYWUError):
    """What went wrong on or with the server; `exit_code` is what `hywu comfy run` returns."""

    exit_code = 1


class Denied(ServerError):
    """The server, or what stands before it, wants a login, or another one."""


class ServerGone(ServerError):
    """The server can't be reached, or went away."""

    exit_code = 3


class Refused(ServerError):
    """The server refused the workflow: validation, or a branch of it that it would drop."""

    exit_code = 4


class Busy(Refused):
    """The server takes no more for now: its queue, or what stands before it, is full."""


class NodeFailed(ServerError):
    """A node raised an exception."""

    exit_code = 5


class Interrupted(ServerError):
    """Somebody interrupted the prompt on the server."""

    exit_code = 6


class TimedOut(ServerError):
    """The prompt took longer than allowed; it was interrupted."""

    exit_code = 7


class Removed(ServerError):
    """Somebody took the waiting prompt out of the server's queue."""

    exit_code = 8


class Cleared(ServerError):
    """The prompt ran, and the server's record of it is gone: nobody can say how it ended."""

    exit_code = 9


class Restarted(ServerError):
    """The server started anew while the prompt waited or ran, and knows nothing of it."""

    exit_code = 10


def describe_refusal(answer: Any) -> str:
    """One sentence for ComfyUI's validation answer `{"error": …, "node_errors": …}`, or what came instead."""
    if not isinstance(answer, dict):
        return str(answer)[:300]
    parts = []
    for node, said in _items(answer.get("node_errors")):
        for error in _list(_get(said, "errors")):
            name = _get(_get(error, "extra_info"), "input_name")
            where = f"node {node} ({_get(said, 'class_type')})" + (
                f", input {name}" if name else ""
            )
            details = _get(error, "details") or ""
            parts.append(f"{where}: {_get(error, 'message')}{f' ({details})' if details else ''}")
    if not parts:
        error = answer.get("error") or {}
        if not isinstance(error, dict):
            return str(error)
        parts = [f"{error.get('message', 'no reason given')} {error.get('details') or ''}".strip()]
    return "; ".join(parts)


# A server of another version, or what stands before it, may answer anything.


def _get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _items(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def failure(kind: str, data: dict[str, Any]) -> ServerError | None:
    """What an event of a prompt, or a message in its record, says went wrong."""
    if kind == "execution_error":
        reason = str(data.get("exception_message")).strip()
        return NodeFailed(
            f"Node {data.get('node_id')} ({data.get('node_type')}) failed with "
            f"{str(data.get('exception_type')).rpartition('.')[2]}: {reason}"
        )
    if kind == "execution_interrupted":
        return Interrupted(f"The prompt was interrupted at node {data.get('node_id')}.")
    return None


def check_record(record: dict[str, Any]) -> None:
    """Raises NodeFailed or Interrupted where a history record says that its prompt didn't end well."""
    status = record.get("status")
    for message in _list(_get(status, "messages")):
        kind, data = (
            message if isinstance(message, (list, tuple)) and len(message) == 2 else ("", 0)
        )
        if isinstance(data, dict) and (wrong := failure(str(kind), data)):
            raise wrong
    if _get(status, "status_str") == "error":
        raise NodeFailed("The prompt failed, and the server's record doesn't say where.")
