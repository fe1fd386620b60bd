"""Change the model's weights in place, from a trainer's broadcasts or from disk, and prove what is loaded.

An update is checked before the first parameter is written, so a refused one leaves the old weights whole. Tensors
that are broadcast one by one are received into the parameters themselves. If that fails, the update must be sent again
before anything is generated. Runs on the model thread, between steps.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from opd_async.actors.engine.errors import WeightError
from opd_async.actors.engine.groups import TensorSpec, WeightGroups

CHECKSUM_BYTES = 16


class ModelWeights:
    """The parameters of a model by Hugging Face name."""

    def __init__(self, model: torch.nn.Module, groups: WeightGroups) -> None:
        self._groups = groups
        unique = dict(model.named_parameters())
        # A name that shares its parameter with an earlier one is tied: it is accepted, never loaded.
        every = dict(model.named_parameters(remove_duplicate=False))
        self._params: dict[str, torch.nn.Parameter] = unique
        self._tied = set(every) - set(unique)

    def describe(
        self, names: Sequence[str], dtypes: Sequence[str], shapes: Sequence[Sequence[int]]
    ) -> list[TensorSpec]:
        """Check an announced update against the model. Raises WeightError naming the first tensor that does not fit."""
        if not len(names) == len(dtypes) == len(shapes):
            raise WeightError(f"{len(names)} names, {len(dtypes)} dtypes and {len(shapes)} shapes must be equally many")
        specs = []
        for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
            kind = getattr(torch, str(dtype).removeprefix("torch."), None)
            if not isinstance(kind, torch.dtype):
                raise WeightError(f"{name}: {dtype!r} is not a torch dtype")
            specs.append(TensorSpec(name, kind, tuple(int(size) for size in shape)))
            self._check(specs[-1], same_dtype=True)
        if len(set(names)) != len(names):
            raise WeightError("a tensor name appears twice in one update")
        return specs

    def load_broadcast(self, group: str, specs: Sequence[TensorSpec], flattened: bool) -> None:
        """Receive the announced tensors and write them into the model."""
        places = [self._params[spec.name].detach() if spec.name in self._params else None for spec in specs]
        received = self._groups.receive(group, specs, flattened, places)
        pairs = zip(specs, places, received, strict=True)
        self._write({spec.name: tensor for spec, place, tensor in pairs if tensor is not place})

    def load_folder(self, path: Path) -> int:
        """Load all safetensors of a folder; every parameter must be there. Returns how many tensors were loaded."""
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise WeightError(f"no *.safetensors file in {path}")
        loaded: dict[str, torch.Tensor] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as reader:
                    for name in reader.keys():  # noqa: SIM118  # not a mapping: it has no __iter__
                        loaded[name] = reader.get_tensor(name)
            except Exception as error:  # the edge to the library: an odd header ends in any exception
                raise WeightError(f"cannot read {file}: {error}") from error
        # Files may be in another precision than the engine runs in; broadcasts may not.
        for name, tensor in loaded.items():
            self._check(TensorSpec(name, tensor.dtype, tuple(tensor.shape)), same_dtype=False)
        missing = sorted(set(self._params) - set(loaded))
        if missing:
            raise WeightError(f"{path} lacks {len(missing)} of the model's tensors, the first is {missing[0]}")
        self._write(loaded)
        return len(loaded)

    def checksums(self) -> dict[str, str]:
        """Return the BLAKE2b (16 bytes, hex) of each parameter's contiguous bytes in its own dtype; no tied names."""
        sums = {}
        for name, param in self._params.items():
            data = param.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            sums[name] = hashlib.blake2b(data.data, digest_size=CHECKSUM_BYTES).hexdigest()
        return sums

    def _check(self, spec: TensorSpec, same_dtype: bool) -> None:
        if spec.name in self._tied:
            return
        param = self._params.get(spec.name)
        if param is None:
            raise WeightError(f"the model has no tensor named {spec.name}")
        if tuple(param.shape) != spec.shape:
            raise WeightError(f"{spec.name}: shape {list(spec.shape)} announced, the model has {list(param.shape)}")
        if same_dtype and param.dtype != spec.dtype:
            raise WeightError(
                f"{spec.name}: {spec.dtype} announced, the model runs in {param.dtype}; "
                f"send that dtype, so that checksums agree, or start the engine with another --dtype"
            )

    def _write(self, tensors: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in tensors.items():
                # A tied LM head is the embedding; writing it would only write the same tensor again.
                if name not in self._tied:
                    self._params[name].copy_(tensor)
