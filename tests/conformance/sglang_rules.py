"""What SGLang takes and refuses of the weight routes, version by version: its rules, without a server or a GPU.

Read in the sources of the supported versions. What they have in common:

    a rank of a group is rank_offset + tp_rank, also in a server of several pipeline stages
    flush_cache is true and the pause's mode is abort where nothing is said; weight_version is text
    a bucket is its tensors back to back, without padding
    handles are one pickle for each tensor-parallel rank, made of allowed globals only

Since 0.5.21 an update runs in a session; an unknown group is refused there, and ended the scheduler before.
"""

from __future__ import annotations

import base64
import io
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

VERSIONS = ("0.5.15", "0.5.20", "0.5.23")
Body = Mapping[str, Any]
REQUIRED: dict[str, dict[str, type]] = {
    "/init_weights_update_group": {
        "master_address": str,
        "master_port": int,
        "rank_offset": int,
        "world_size": int,
    },
    "/update_weights_from_distributed": {"names": list, "dtypes": list, "shapes": list},
    "/update_weights_from_tensor": {"serialized_named_tensors": list},
    "/update_weights_from_disk": {"model_path": str},
    "/update_weight_version": {"new_version": str},
}
OPTIONAL: dict[str, type] = {
    "group_name": str,
    "backend": str,
    "flush_cache": bool,
    "abort_all_requests": bool,
    "weight_version": str,
    "load_format": str,
    "selector": str,
    "mode": str,
}
NULLABLE = ("weight_version", "load_format")
CHOICES = {"selector": ("target", "draft", "all"), "mode": ("abort", "retract", "in_place")}
SESSION_ROUTES = ("/begin_weight_update", "/end_weight_update")


class Refused(Exception):
    """The server answers with an error."""


class SchedulerEnded(Exception):
    """The scheduler process ends at what nobody there catches, and the server with it."""


@dataclass(slots=True)
class Rules:
    """One server: what it has been told so far, and what it says to the next request. All of it but the transfer."""

    version: str
    tensor_parallel: int = 1
    groups: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """The group's name, and which of its ranks this server's are."""
    session: bool = False
    weight_version: str = "default"
    running: int = 0
    """Requests that hold the cache."""

    @property
    def has_sessions(self) -> bool:
        """Whether this version knows begin and end."""
        return tuple(map(int, self.version.split("."))) >= (0, 5, 21)

    def post(self, route: str, body: Body) -> None:
        """Take a request, or raise `Refused` or `SchedulerEnded`."""
        self._check_fields(route, body)
        match route:
            case "/init_weights_update_group":
                self._join(body)
            case "/destroy_weights_update_group":
                if self.groups.pop(body.get("group_name", "weight_update_group"), None) is None:
                    raise Refused("The group to be destroyed does not exist.")
            case "/begin_weight_update":
                self._in_session(False)
                self.session = True
            case "/end_weight_update":
                self._in_session(True)
                self.session = False
            case "/update_weights_from_distributed":
                self._receive(body)
                self._updated(body)
            case "/update_weights_from_tensor":
                self._open(body)
                self._updated(body)
            case "/update_weight_version":
                self.weight_version = body["new_version"]

    def ranks_of(self, body: Body) -> tuple[int, ...]:
        """As which ranks the server's processes come to a group: a pipeline stage's are numbered as the first one's."""
        return tuple(body["rank_offset"] + rank for rank in range(self.tensor_parallel))

    def layout(self, body: Body) -> list[tuple[int, int]]:
        """Where each tensor of a flattened bucket begins and ends, in bytes."""
        places, offset = [], 0
        for name, text, shape in zip(body["names"], body["dtypes"], body["shapes"], strict=True):
            dtype = getattr(torch, text)
            if any(size < 0 for size in shape):
                raise Refused(f"Negative dimension in received tensor {name}: {shape}")
            if offset % dtype.itemsize:
                raise Refused(f"Unaligned received tensor {name}: byte offset {offset}, dtype {dtype}")
            size = math.prod(shape) * dtype.itemsize
            places.append((offset, offset + size))
            offset += size
        if not places:
            raise Refused("Cannot create empty tensor bucket")
        return places

    def _check_fields(self, route: str, body: Body) -> None:
        if route in SESSION_ROUTES and not self.has_sessions:
            raise Refused("Not Found")
        for name, kind in REQUIRED.get(route, {}).items():
            if name not in body:
                raise Refused(f"{name}: Field required")
            if not _is(body[name], kind):
                raise Refused(f"{name}: Input should be a valid {kind.__name__}")
        for name, kind in OPTIONAL.items():
            if name not in body or (body[name] is None and name in NULLABLE):
                continue
            if not _is(body[name], kind):
                raise Refused(f"{name}: Input should be a valid {kind.__name__}")
            if name in CHOICES and body[name] not in CHOICES[name]:
                raise Refused(f"{name}: Input should be one of {CHOICES[name]}")

    def _join(self, body: Body) -> None:
        name, ranks = body.get("group_name", "weight_update_group"), self.ranks_of(body)
        if not name:
            raise SchedulerEnded("Group name cannot be empty")
        if min(ranks) < 0 or max(ranks) >= body["world_size"]:
            raise Refused("Failed to initialize custom process group")
        self.groups[name] = ranks  # one of the same name is forgotten without a word

    def _in_session(self, wanted: bool) -> None:
        if self.has_sessions and self.session != wanted:
            raise Refused("no weight-update session is open" if wanted else "a weight-update session is already open")

    def _receive(self, body: Body) -> None:
        self._in_session(True)
        if (name := body.get("group_name", "weight_update_group")) not in self.groups:
            raise (Refused if self.has_sessions else SchedulerEnded)(f"Group {name} not in {list(self.groups)}")
        if not all(isinstance(getattr(torch, str(text), None), torch.dtype) for text in body["dtypes"]):
            raise Refused("module 'torch' has no attribute")
        if body.get("load_format") == "flattened_bucket":
            self.layout(body)

    def _open(self, body: Body) -> None:
        self._in_session(True)
        payloads = body["serialized_named_tensors"]
        if len(payloads) < self.tensor_parallel:
            raise SchedulerEnded("list index out of range")
        for payload in payloads[: self.tensor_parallel]:
            unpickled(payload, self.version)

    def _updated(self, body: Body) -> None:
        if body.get("weight_version") is not None:
            self.weight_version = body["weight_version"]
        if body.get("flush_cache", True) and self.running:
            raise Refused("Weights were updated, but the cache was not flushed")


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


# --- handles ----------------------------------------------------------------------------------------------------------

PREFIXES = (
    *("builtins.", "collections.", "copyreg.", "functools.", "itertools.", "operator.", "types.", "weakref.", "torch."),
    *("multiprocessing.resource_sharer.", "multiprocessing.reduction.", "pickletools."),
    *("peft.", "transformers.", "huggingface_hub.", "torch_npu."),
)
"""Until 0.5.20: modules whose every name is allowed, but `DENIED`. Its own modules are left out."""
DENIED = {
    *(("builtins", name) for name in ("eval", "exec", "compile")),
    *(("os", "system"), ("subprocess", "Popen"), ("subprocess", "run"), ("codecs", "decode")),
    *(("types", "CodeType"), ("types", "FunctionType")),
}
KINDS = ("BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short")
EXACT = {
    *(("builtins", n) for n in ("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list")),
    *(("builtins", name) for name in ("range", "set", "slice", "str", "tuple")),
    *(("collections", name) for name in ("OrderedDict", "defaultdict", "deque", "Counter")),
    *(("copyreg", "__newobj__"), ("copyreg", "__newobj_ex__"), ("functools", "partial"), ("_codecs", "encode")),
    *(("itertools", "chain"), ("itertools", "repeat"), ("types", "SimpleNamespace")),
    *(("multiprocessing.reduction", name) for name in ("_rebuild_partial", "_rebuild_socket")),
    ("multiprocessing.resource_sharer", "DupFd"),
    *(("torch", name) for name in ("Tensor", "Size", "device", "dtype", "UntypedStorage", "bfloat16", "bool")),
    *(("torch", name) for name in ("float16", "float32", "float64", "float", "half", "double", "uint8", "int8")),
    *(("torch", name) for name in ("int16", "int32", "int64", "int", "long", "short", "float8_e4m3fn", "float8_e5m2")),
    *((module, f"{kind}Storage") for module in ("torch", "torch.cuda") for kind in KINDS),
    *((module, f"{kind}Tensor") for module in ("torch", "torch.cuda") for kind in KINDS),
    ("torch.nn.parameter", "Parameter"),
    ("torch.serialization", "_get_layout"),
    *(("torch._utils", f"_rebuild_{name}") for name in ("tensor", "tensor_v2", "tensor_v3", "parameter")),
    ("torch._tensor", "_rebuild_from_type_v2"),
    *(("torch.storage", name) for name in ("UntypedStorage", "_UntypedStorage", "TypedStorage")),
    *(("torch.multiprocessing.reductions", f"rebuild_{name}") for name in ("tensor", "meta_tensor", "cuda_tensor")),
    *(("torch.multiprocessing.reductions", f"rebuild_storage_{name}") for name in ("fd", "filename", "empty")),
    *(("torch.multiprocessing.reductions", f"rebuild_typed_storage{name}") for name in ("", "_child")),
}
"""Since 0.5.21: the names that are allowed, as far as a pickle of tensors could have them."""


@dataclass(frozen=True)
class Opened:
    """A call that a pickle asks for, not made: a handle of a GPU can be opened on none that is not there."""

    function: str
    arguments: tuple[Any, ...]


def unpickled(payload: str, version: str) -> Any:
    """What a server of this version reads in the payload; `SchedulerEnded` at a global that it does not allow."""

    class Safe(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            exact = version not in ("0.5.15", "0.5.20")
            allowed = (module, name) in EXACT if exact else f"{module}.".startswith(PREFIXES)
            if not allowed or (module, name) in DENIED:
                raise SchedulerEnded(f"Blocked unsafe global ({module}.{name})")
            if name == "rebuild_cuda_tensor":
                return lambda *arguments: Opened(name, arguments)
            return super().find_class(module, name)

    try:
        raw = base64.b64decode(payload, validate=True)
    except ValueError as error:
        raise Refused(f"serialized_named_tensors: {error}") from None
    return Safe(io.BytesIO(raw)).load()
