"""A Transformers (or Diffusers) model under its own verbs while it has an adapter.

``save_pretrained`` and ``push_to_hub`` write the adapter, as they do for a model with an adapter of PEFT; Trainer's
checkpoints are adapters that it resumes from; what else Transformers can do with adapters works or says what to call.
All of this is instance attributes, which detach() takes away again.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
from torch import nn

from unilora_ext.adapter import Adapter, get_adapter
from unilora_ext.attachment import CHILD, base_model_of
from unilora_ext.errors import UniLoRAError
from unilora_ext.export import ADAPTER_FILES, lora_of, write_folder
from unilora_ext.files import replace_file
from unilora_ext.layout import Order
from unilora_ext.sharded_tensors import full, is_sharded
from unilora_ext.uncalled import Handle

__all__ = ["adopt", "is_pretrained"]

logger = logging.getLogger("unilora_ext")

_CLASSES = (("transformers.modeling_utils", "PreTrainedModel"), ("diffusers.models.modeling_utils", "ModelMixin"))
_CHECKPOINT = re.compile(r"checkpoint-\d+")
"""Folders of Trainer's checkpoints."""
_WEIGHTS = "model.safetensors"
"""What Trainer reads a checkpoint's weights from."""
_NAME = "unilora"
"""Of the adapter, where Transformers wants one."""


def is_pretrained(module: nn.Module) -> bool:
    """Whether a module is a model of Transformers or Diffusers, with their verbs."""
    return any(isinstance(module, getattr(sys.modules.get(name), cls, ())) for name, cls in _CLASSES)


def adopt(model: nn.Module, layers: Iterable[str]) -> Iterator[Handle]:
    """Gives the verbs to an adapted model, and takes saving from the models inside it that have adapted layers: their
    weights alone are not what they compute.

    Args:
        model: with its vector.
        layers: names of the adapted layers.
    """
    if is_pretrained(model):
        yield _Verbs(model, _verbs(model))
    inside = {id(model.get_submodule(name)) for name in layers}
    for name, part in model.named_modules():
        if name and is_pretrained(part) and any(id(module) in inside for module in part.modules()):
            yield _Verbs(part, {"save_pretrained": partial(_refuse_part, model, name)})


class _Verbs:
    """Instance attributes of a module, until they are removed."""

    def __init__(self, module: nn.Module, verbs: dict[str, Any]) -> None:
        self.module, self.names = module, list(verbs)
        self.before = {name: module.__dict__[name] for name in verbs if name in module.__dict__}
        module.__dict__.update(verbs)

    def remove(self) -> None:
        for name in self.names:
            self.module.__dict__.pop(name, None)
        self.module.__dict__.update(self.before)


def _verbs(model: nn.Module) -> dict[str, Any]:
    """Partial functions of the model: a deep copy of it has its own."""
    return {
        "_hf_peft_config_loaded": True,  # Transformers' sign of a model that has an adapter
        "_keys_to_ignore_on_save": _frozen_keys(model),  # what Trainer need not find in a checkpoint
        "save_pretrained": partial(save_pretrained, model),
        "push_to_hub": partial(push_to_hub, model),
        "disable_adapters": partial(_switch, model, False),
        "enable_adapters": partial(_switch, model, True),
        "active_adapters": partial(_active, model),
        "get_adapter_state_dict": partial(trained_tensors, model),
        **{name: partial(_refuse_verb, name) for name in ("add_adapter", "load_adapter")},
        **{name: partial(_refuse_verb, name) for name in ("set_adapter", "delete_adapter")},
    }


def _frozen_keys(model: nn.Module) -> list[str]:
    """The keys of the model's ``state_dict`` that an adapter leaves out."""
    own = {id(tensor) for tensor in trained_tensors(model).values()}
    temporary = {
        f"{name}.{key}".lstrip(".")
        for name, module in model.named_modules(remove_duplicate=False)
        for key in module._non_persistent_buffers_set
    }
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [name for name, tensor in tensors if id(tensor) not in own and name not in temporary]


def trained_tensors(model: nn.Module, adapter_name: str | None = None, state_dict: Any = None) -> dict[str, Any]:
    """What training changes in a model, by its ``state_dict`` keys. The other arguments are Transformers', and are not
    needed."""
    adapter = get_adapter(model)
    return {**{f"{CHILD}.{name}": t for name, t in adapter.trained.items()}, **adapter.exchanged()}


# ---- saving ---------------------------------------------------------------------------------------------------------


def save_pretrained(
    model: nn.Module,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: Any = None,
    push_to_hub: bool = False,
    **options: Any,
) -> None:
    """Writes the adapter of a model in place of all its weights: this package's files, which :func:`unilora_ext.load`
    reads, and the same update as plain LoRA, which ``from_pretrained`` and ``pipeline`` load by means of PEFT.

    In a folder of Trainer's (``checkpoint-500``) comes what Trainer resumes from.

    Args:
        model: with an adapter.
        save_directory: as in Transformers.
        is_main_process: whether this process writes.
        state_dict: not needed.
        push_to_hub: whether to upload the folder too; `repo_id`, `token` and others as in :func:`push_to_hub`.
        **options: others of Transformers, which say how large weights are written.

    Raises:
        UniLoRAError: the update is merged into the weights, or theta_d is sharded by torch's ``fully_shard``, so that
            all processes have to take part. Nothing is written.
    """
    adapter, folder = get_adapter(model), Path(save_directory)
    if adapter.merged:
        raise UniLoRAError(
            "save_pretrained: the update is merged into the weights. For the plain model with the update in it, call "
            "detach(merge=True) before; for the adapter, unmerge()"
        )
    if any(map(is_sharded, adapter.trained.values())):
        raise UniLoRAError(
            "save_pretrained: theta_d is sharded by fully_shard: call adapter.save(folder) on all processes, or shard "
            "by unilora_ext.distributed.fully_shard, which leaves theta_d whole"
        )
    if not is_main_process:
        return
    resumable = _CHECKPOINT.fullmatch(folder.name) is not None
    adapter.save(folder, resumable=resumable)
    _write_lora(adapter, folder)
    if callable(getattr(model, "can_generate", None)) and model.can_generate():
        model.generation_config.save_pretrained(folder)
    if resumable:
        tensors = {name: full(t).cpu().contiguous().clone() for name, t in trained_tensors(model).items()}
        replace_file(folder / _WEIGHTS, safetensors.torch.save(tensors, {"format": "pt"}))
    elif not (folder / "README.md").exists():
        replace_file(folder / "README.md", model_card(adapter, folder).encode())
    if push_to_hub:
        _upload(folder, options.pop("repo_id", folder.name), **options)


def _write_lora(adapter: Adapter, folder: Path) -> None:
    """The plain LoRA beside an adapter, where there is one."""
    try:
        record, tensors = lora_of(adapter)
    except UniLoRAError as error:
        for name in ADAPTER_FILES:  # of an adapter that was here before
            (folder / name).unlink(missing_ok=True)
        logger.warning(
            "%s: the adapter is saved, but has no form of plain LoRA (%s), so from_pretrained() cannot load it: "
            "unilora_ext.load(model, folder) does",
            folder,
            error,
        )
    else:
        write_folder(adapter, folder, record, tensors)


def push_to_hub(
    model: nn.Module, repo_id: str, *, commit_message: str | None = None, tags: list[str] | None = None, **options: Any
) -> Any:
    """Uploads what :func:`save_pretrained` writes, its model card too.

    Args:
        model: with an adapter.
        repo_id: on the hub; made if it is missing.
        commit_message: of the upload.
        tags: of the model card, beside its own.
        **options: private, token, revision, create_pr, commit_description, as in Transformers.

    Returns:
        What ``huggingface_hub.HfApi.upload_folder`` returns.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "README.md").write_text(model_card(get_adapter(model), folder, repo_id, tags or ()))
        save_pretrained(model, folder)
        return _upload(folder, repo_id, commit_message=commit_message, **options)


def _upload(folder: Path, repo_id: str, **options: Any) -> Any:
    from huggingface_hub import HfApi

    api = HfApi(token=options.get("token"))
    repo_id = api.create_repo(repo_id, private=options.get("private"), exist_ok=True).repo_id
    kept = ("commit_message", "commit_description", "revision", "create_pr")
    return api.upload_folder(
        repo_id=repo_id, folder_path=folder, **{name: options[name] for name in kept if options.get(name) is not None}
    )


# ---- the model card -------------------------------------------------------------------------------------------------


def model_card(adapter: Adapter, folder: Path, repo_id: str | None = None, tags: Iterable[str] = ()) -> str:
    """README.md of an adapter: what it is, its sizes, and how to load it."""
    model, config, vector = adapter.model, adapter.config, adapter.vector
    base = base_model_of(model) or "unknown"
    kind, library = type(model).__name__, type(model).__module__.partition(".")[0]
    where = repo_id or folder.name
    stored = sum(t.numel() * t.element_size() for t in trained_tensors(model).values())
    tags = ["uni-lora", "unilora_ext", *(getattr(model, "model_tags", None) or ()), *tags]  # a trainer's among them
    head = {"base_model": base, "tags": list(dict.fromkeys(tags))}
    front = "".join(f"{key}: {json.dumps(value)}\n" for key, value in head.items())
    local = f'huggingface_hub.snapshot_download("{repo_id}")' if repo_id else json.dumps(where)
    lora = (
        f"""
Without unilora_ext, as plain LoRA by means of PEFT (the same outputs; {adapter.projection.D:,} numbers):

```python
model = {kind}.from_pretrained({json.dumps(where)})
```
"""
        if library == "transformers" and adapter.projection.order is not Order.DENSE
        else ""
    )
    return f"""---
{front}---

# Uni-LoRA adapter of {base}

One trainable vector for all of the model's LoRA matrices ([Uni-LoRA](https://arxiv.org/abs/2506.00799)).

| | |
| --- | --- |
| base model | `{base}` ({kind}) |
| projection | {config.projection}, seed {config.seed} |
| numbers trained | {vector.theta_d.numel():,} (d) of {adapter.projection.D:,} (D) |
| rank, layers | {config.r}, {len(vector.slots)} |
| trained whole | {", ".join(config.modules_to_save) or "nothing"} |
| bytes | {stored:,} |

```python
import unilora_ext as ul
from {library} import {kind}

model = {kind}.from_pretrained({json.dumps(base)})
adapter = ul.load(model, {local})
```
{lora}"""


# ---- the other verbs ------------------------------------------------------------------------------------------------


def _switch(model: nn.Module, on: bool) -> None:
    adapter = get_adapter(model)
    adapter.enable() if on else adapter.disable()


def _active(model: nn.Module) -> list[str]:
    return [_NAME]


def _refuse_part(model: nn.Module, name: str, *args: Any, **options: Any) -> NoReturn:
    raise UniLoRAError(
        f"save_pretrained: '{name}' is a part of an adapted {type(model).__name__}, and its weights alone are not what "
        "it computes. get_adapter(model).save(folder) writes the adapter; detach(merge=True) leaves a plain model with "
        "the update in it, detach() one without"
    )


def _refuse_verb(verb: str, *args: Any, **options: Any) -> NoReturn:
    raise UniLoRAError(
        f"{verb}: this model has one adapter, of unilora_ext: get_adapter(model).detach() takes it off; "
        "unilora_ext.load(model, folder) attaches a saved one"
    )
