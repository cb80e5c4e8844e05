"""`RoeLlavaHarness`: our models as chat models of lmms-eval, through `generate` and what it decides.

lmms-eval hands over a task's requests all at once. They are batched within a task and equal generation settings,
padded on the left by the processor, answered by `generate`, and put back into order. What routing did is on
`routing_summary`, and in lmms-eval's own results under `throughput`. B batch, L decoder layers.
"""

import json
import time
from contextlib import nullcontext

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.protocol import ChatMessages
from lmms_eval.utils import Collator
from loguru import logger
from torch import Tensor
from tqdm import tqdm

from ..convert.kinds import kind_of
from .comparison import BESIDE_SCORES
from .expert_log import TaskExperts, count_experts, watched_experts
from .generation_settings import cut_at, generate_keywords, stop_words
from .loading import open_checkpoint, torch_dtype
from .processes import default_device, join_processes
from .route_log import RouteLog, TaskRoutes

PATIENCE = 256


class RoeLlavaHarness(lmms):
    """A model of lmms-eval (`--model roe_llava`, whichever kind it is); it refuses to run dense unless told to."""

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
        device_map: str | None = None,
        batch_size: int | str = 1,
        skip_ratio: float | None = None,
        route_bias: float | None = None,
        dense: bool = False,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        patience: int = PATIENCE,
        max_batch_size: int | None = None,
    ) -> None:
        """
        Args:
            pretrained, revision: folder or Hub id of a checkpoint of ours; with `dense` of any LLaVA without experts.
            device: where to put the model; a GPU if there is one. Not together with `device_map`.
            skip_ratio: share to skip, for a calibrated model; without it the routers decide as they were trained to.
            route_bias: added to the keep logits instead.
            dense: keep every layer, of RoE.
            patience: after how many examples that keep every layer to stop with an error; 0 to look at the end only.
            max_batch_size: lmms-eval's, for automatic batch sizes, which there are none of here.
        Raises: ValueError for arguments that contradict each other, or a model that cannot be routed.
        """
        super().__init__()
        self.settings = routing_settings(dense, skip_ratio, route_bias)
        self.batch_size = checked_batch_size(batch_size)
        accelerator = join_processes(device)
        if device is None and device_map is None:
            device = str(accelerator.device) if accelerator else default_device()
        if device is not None and device_map is not None:
            raise ValueError(f"device={device!r} and device_map={device_map!r} both say where the model goes: give one")
        self._model, self.processor = open_checkpoint(
            str(pretrained),
            revision=revision,
            trust_remote_code=trust_remote_code,
            dense=dense,
            dtype=torch_dtype(dtype),
            device_map=device_map if device is None else {"": device},
            attn_implementation=attn_implementation,
        )
        kind = kind_of(self._model.config.model_type)
        self.decides = None if kind is None else kind.decides
        if self.decides == "experts" and self.settings:
            raise ValueError(f"{', '.join(self.settings)}: {pretrained} skips no layers, its tokens go through experts")
        if self.decides != "layers":
            self.settings = {}
        self._device = self._model.device
        has_experts = self.decides == "experts"
        self.log = self.whole_log = RouteLog(
            dense or has_experts, int(patience), TaskExperts if has_experts else TaskRoutes
        )
        if accelerator:  # else lmms-eval makes one of its own
            self.accelerator = accelerator
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def routing_summary(self) -> dict[str, dict]:
        """What was decided, seconds and more, of every task so far: `TaskRoutes.summary` or `TaskExperts.summary`."""
        return self.whole_log.summary()

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """An answer per request, in order.

        Raises: ValueError if nothing was skipped that should have been, or a request holds other media than pictures.
        """
        padding = [bool((request.metadata or {}).get("__padding_only__")) for request in requests]
        rows = [(*request.args, is_padding) for request, is_padding in zip(requests, padding, strict=True)]
        collator = Collator(rows, longest_first, group_fn=batched_together, grouping=True)
        answers = []
        with tqdm(total=len(rows), disable=self.rank != 0, desc="Answering along routes") as bar:
            for number, batch in enumerate(collator.get_batched(n=self.batch_size)):
                if number == 0:
                    self.warm_up(batch)
                answers += self.answer(batch)
                bar.update(len(batch))
                self.log.check_so_far()
        self.whole_log = self.log_of_all_processes()
        self.whole_log.check()
        self.report()
        return collator.get_original(answers)

    def warm_up(self, batch: list[tuple]) -> None:
        """Run a batch that is not counted: what a first call costs does not belong to the first task's time."""
        with torch.inference_mode():
            self._model.generate(**self.inputs(batch), **self.settings, do_sample=False, max_new_tokens=2)

    def answer(self, batch: list[tuple]) -> list[GenerationResult]:
        """The answers of requests of one task and equal settings; their routes and times go to the log."""
        start = time.perf_counter()
        task, task_settings = batch[0][4], batch[0][2]
        keywords, words = generate_keywords(task_settings), stop_words(task_settings)
        inputs = self.inputs(batch)
        synchronize(self._device)
        before = time.perf_counter()
        watched = watched_experts(self._model) if self.decides == "experts" else nullcontext()
        with torch.inference_mode(), watched as passes:
            output = self._model.generate(**inputs, **keywords, **self.settings, return_dict_in_generate=True)
        synchronize(self._device)
        seconds = time.perf_counter() - before
        new_tokens = output.sequences[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(new_tokens, skip_special_tokens=True)
        counts = self.token_counts(new_tokens)
        asked = torch.tensor([not row[-1] for row in batch])
        record = self.log.of(task)
        if self.decides == "experts":
            count_experts(record, passes, asked, self._model)
        else:
            record.add(self.routes_of(output, len(batch), keywords.get("num_beams", 1))[asked])
        record.seconds += seconds
        record.new_tokens += sum(count for count, counted in zip(counts, asked.tolist(), strict=True) if counted)
        record.total_seconds += time.perf_counter() - start
        return [
            GenerationResult(text=cut_at(text, words), token_counts=TokenCounts(output_tokens=count))
            for text, count in zip(texts, counts, strict=True)
        ]

    def inputs(self, batch: list[tuple]):
        """The batch's questions as `generate` takes them, padded on the left."""
        chats = []
        for _, doc_to_messages, _, doc_id, task, split, _ in batch:
            messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
            _, videos, audios = messages.extract_media()
            if videos or audios:
                kind = "a video" if videos else "sound"
                raise ValueError(f"document {doc_id} of task {task} holds {kind}: this model takes pictures and text")
            chats.append(messages.to_hf_messages())
        inputs = self.processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        return inputs.to(self._device, self._model.dtype)

    def routes_of(self, output, rows: int, beams: int) -> Tensor:
        """Routes (B, L) bool on the CPU; all layers for a model without routers.

        Raises: RuntimeError if a routed model gave none.
        """
        if self.decides is None:
            return torch.ones(rows, self._model.config.get_text_config().num_hidden_layers, dtype=torch.bool)
        routes = getattr(output.past_key_values, "routes", None)
        if routes is None or routes.shape[0] != rows * beams:
            found = "none" if routes is None else f"{routes.shape[0]} rows of them"
            raise RuntimeError(f"generate was to say the routes of {rows} prompts with {beams} beams, got {found}")
        return routes[::beams].cpu()  # the beams of a prompt share its route

    def token_counts(self, new_tokens: Tensor) -> list[int]:
        """Generated tokens per row, up to and with the end token."""
        ends = self._model.generation_config.eos_token_id
        ends = torch.tensor([] if ends is None else ends, device=new_tokens.device).flatten()
        is_end = torch.isin(new_tokens, ends)
        return [row.index(True) + 1 if True in row else len(row) for row in is_end.tolist()]

    def log_of_all_processes(self) -> RouteLog:
        """This process's log, or one that holds every process's."""
        if self.world_size == 1:
            return self.log
        logs: list = [None] * self.world_size
        torch.distributed.all_gather_object(logs, self.log)
        return RouteLog.merged(logs)

    def report(self) -> None:
        """One line per task, and numbers for lmms-eval's results (`throughput`)."""
        numbers = {}
        for task, record in self.whole_log.tasks.items():
            summary = record.summary()
            logger.info(f"{task}: {record.examples} examples, {record.told()}, {record.seconds:.1f} s in generate")
            if not summary.get("skip_ratio", True) and not self.log.may_be_dense:
                logger.warning(f"{task}: every example kept every layer")
            names = [name for name in ("examples", *BESIDE_SCORES) if summary.get(name) is not None]
            numbers |= {f"{task}/{name}": float(summary[name]) for name in names}
        records = self.whole_log.tasks.values()
        seconds, tokens = sum(one.seconds for one in records), sum(one.new_tokens for one in records)
        log_metrics(seconds, tokens, tokens / seconds if seconds else 0.0, numbers)

    def loglikelihood(self, requests):
        """Not available."""
        raise ValueError(
            "tasks that compare the likelihood of given answers (output_type loglikelihood or multiple_choice) are not "
            "supported: a route is for prompts that generate answers. Take the task's generate_until variant"
        )

    def generate_until_multi_round(self, requests):
        """Not available."""
        raise ValueError(
            "tasks of several rounds (generate_until_multi_round) are not supported: give single questions"
        )


def routing_settings(dense: bool, skip_ratio: float | None, route_bias: float | None) -> dict:
    """Routing keywords of `generate`.

    Raises: ValueError if they contradict each other, or keep every layer without saying dense.
    """
    given = {"skip_ratio": skip_ratio, "route_bias": route_bias}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1 or (dense and given):
        said = ", ".join([*(["dense=True"] if dense else []), *(f"{name}={value}" for name, value in given.items())])
        raise ValueError(f"{said}: give one of dense, skip_ratio and route_bias")
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name} must be a number, got {value!r}")
    if skip_ratio == 0 or route_bias == float("inf"):
        raise ValueError("this keeps every layer: say dense=True (roe-llava evaluate --dense-only) if that is wanted")
    return {"skip_ratio": 0.0} if dense else {name: float(value) for name, value in given.items()}


def checked_batch_size(batch_size: int | str) -> int:
    """Raises: ValueError for what is not a whole number from 1 on."""
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise ValueError(f"batch_size must be a whole number from 1 on, got {batch_size!r}; automatic ones are not had")
    return int(batch_size)


def longest_first(row: tuple) -> tuple:
    """Sorts requests: rows of like length share a batch, and what does not fit shows at once."""
    return -len(row[0]), row[3]


def batched_together(row: tuple) -> dict:
    """What the requests of a batch have in common: task, split, generation settings."""
    return {"task": row[4], "split": row[5], "settings": json.dumps(row[2], sort_keys=True, default=str)}


def synchronize(device: torch.device) -> None:
    """Wait for what a device was given to do."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize()


__all__ = ["RoeLlavaHarness"]
