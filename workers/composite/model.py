"""A composite model on its device: prompts of several modalities in, text out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch

from mmerge.manifests.errors import PromptError
from mmerge.manifests.format.manifest import Manifest
from mmerge.workers.composite.decoder.composer import PromptComposer
from mmerge.workers.composite.decoder.load_check import compare_with_class
from mmerge.workers.composite.decoder.passes import decoder_inputs
from mmerge.workers.composite.decoder.prompt_inputs import PromptInputs, to_batch
from mmerge.workers.composite.loaded import LoadedItems, LoadReport
from mmerge.workers.composite.process_group import ProcessGroup
from mmerge.workers.composite.routing import Routing
from mmerge.workers.generation.answer_stream import Receiver, TokenRelay, stream_text
from mmerge.workers.generation.options import check_options, check_request
from mmerge.workers.generation.random_numbers import seeded
from mmerge.workers.modalities.chat_template import ChatTemplate
from mmerge.workers.modalities.encoders import Encoder
from mmerge.workers.modalities.expert_choice import ExpertChoice
from mmerge.workers.modalities.prompt import Part
from mmerge.workers.modalities.prompt_format import PromptFormat
from mmerge.workers.modalities.text_rules import TextRules

Cache = Literal["dynamic", "static"]
_OWN_OPTIONS = ("cache", "seed")
"""Options of generation that are not transformers' own."""


class Composite:
    """A language model, the encoders of the experts, and the routing between them.

    Made by `load_composite`. In retention mode one expert is rebuilt and every token is multiplied
    by its weights; in expansion mode each token by the weights of its own modality.

    Threads may share a composite. It answers one call at a time, from the encoding of the inputs to
    the decoding of the answer: the others wait for their turn.
    """

    def __init__(
        self,
        *,
        manifest: Manifest,
        expert: str | None,
        language_model: Any,
        routing: Routing,
        tokenizer: Any,
        encoders: Mapping[str, Encoder],
        chats: Mapping[str, ChatTemplate],
        group: ProcessGroup,
        text_is_prefix: bool = False,
        load_reports: Sequence[LoadReport] = (),
        loaded: LoadedItems | None = None,
    ) -> None:
        """Assemble a composite.

        `expert` is the rebuilt one, None in expansion mode; `text_is_prefix` says whether all
        tokens of a prompt of text alone see each other.
        """
        self.manifest = manifest
        self.expert = expert
        self.language_model = language_model
        self.tokenizer = tokenizer
        self._encoders = dict(encoders)
        self.group = group
        self.load_reports = tuple(load_reports)
        """Of every rank, by rank."""
        self.loaded = loaded
        """Tensors that another composite may share, see `load_composite`."""
        self._choice = ExpertChoice(self.encoders, expert)
        self._prompts = PromptFormat(
            manifest,
            expert,
            chats,
            find_expert=self._choice.find,
            # Not a method of this object: a composite in a cycle would keep its memory.
            find_placeholders=partial(_find_placeholders, self._encoders),
        )
        self._routing = routing
        self._composer = PromptComposer(
            language_model,
            tokenizer,
            encoders=self.encoders,
            names=[record.name for record in manifest.experts],
            find_expert=self._choice.find,
            text_is_prefix=text_is_prefix,
        )
        routing.follow(language_model)

    @property
    def encoders(self) -> dict[str, Encoder]:
        """The encoders of the experts that are loaded, by name; an entry may be replaced."""
        return self._encoders

    @property
    def mode(self) -> str:
        """`retention` or `expansion`."""
        return "retention" if self.expert else "expansion"

    @property
    def turn(self) -> AbstractContextManager[Any]:
        """A lock to hold from `embed` to `generate_rows`; other calls take it by themselves."""
        return self._routing.turn

    @property
    def device(self) -> torch.device:
        """Where the language model is."""
        device: torch.device = self.language_model.device
        return device

    def prompt(self, question: str | Sequence[Part], media: Sequence[Part] = ()) -> list[Part]:
        """Return the parts of a prompt, formatted by the recipe's templates or a chat template.

        `question` is a text with places such as `{image}`, or all parts of a message in their
        order, whose text is taken as it is.

        Raises:
            PromptError: the question has a placeholder such as `{image}` without an input for it,
                or the chat template does not fit the prompt.
        """
        return self._prompts.make(
            question,
            media,
            bos=self.tokenizer.bos_token if self._composer.leading_ids() else None,
            num_rows=len(self.language_model.get_input_embeddings().weight),
        )

    def find_expert(self, kind: str) -> str:
        """Return the expert of a part of this kind, an expert's name or a modality.

        Of several experts of one modality the first in the recipe reads its inputs, which is logged
        once; the name of another one as the kind chooses that one.

        Raises:
            PromptError: no loaded expert has that modality.
        """
        return self._choice.find(kind)

    def compare_with_classes(self, rules: TextRules) -> None:
        """Compare a small prompt of each expert with its own class, which scales logits by rules.

        Raises:
            CheckpointError: the class answers otherwise, or the comparison fails.
        """
        with self._routing.turn:
            for name in self.encoders:
                compare_with_class(
                    self.language_model, self._composer, self._routing, expert=name, rules=rules
                )

    @torch.inference_mode()
    def embed(self, parts: Sequence[Part]) -> PromptInputs:
        """Return what enters the language model; it unpacks to embeddings and modality ids.

        Embeddings [tokens, hidden], ids int64 [tokens]. Text is tokenised part by part, after the
        tokenizer's BOS if it adds one. Everything that an encoder returns has the modality of its
        expert.

        Raises:
            PromptError: the prompt is empty, or a part cannot be read or belongs to no expert.
        """
        with self._routing.turn:
            return self._composer.compose(parts)

    @contextmanager
    def _prefill(self, prompts: Sequence[PromptInputs]) -> Iterator[dict[str, torch.Tensor]]:
        """Run the passes inside the context with prompts; yield embeddings and attention mask."""
        batch, mask = to_batch(prompts)
        with (
            self._routing.prefill(batch.ids),
            decoder_inputs(self.language_model, batch, mask),
        ):
            yield {"inputs_embeds": batch.embeds, "attention_mask": mask}

    @torch.inference_mode()
    def logits(self, parts: Sequence[Part]) -> torch.Tensor:
        """Return the logits of all positions, [tokens, vocabulary], in the model's dtype."""
        with self._routing.turn:
            prompt = self._composer.compose(parts)
            self.check_length(len(prompt.ids), 0)
            with self._prefill([prompt]) as inputs:
                logits: torch.Tensor = self.language_model(**inputs, use_cache=False).logits[0]
        return logits

    def generate(self, parts: Sequence[Part], *, max_new_tokens: int = 64, **options: Any) -> str:
        """Return the composite's answer to a prompt. See `generate_batch`."""
        return self.generate_batch([parts], max_new_tokens=max_new_tokens, **options)[0]

    @torch.inference_mode()
    def generate_batch(
        self,
        prompts: Sequence[Sequence[Part]],
        *,
        max_new_tokens: int = 64,
        cache: Cache = "dynamic",
        seed: int | None = None,
        **options: Any,
    ) -> list[str]:
        """Return one answer per prompt. Shorter prompts are padded on the left, as text.

        Args:
            prompts: in any order of text and other inputs.
            max_new_tokens: length of an answer, at most.
            cache: of keys and values: `dynamic` grows, `static` is allocated at once.
            seed: of sampling; the same seed gives the same answers.
            options: of `generate` of transformers (`do_sample`, `temperature`, `top_p`,
                `num_beams`, …); greedy decoding by default.

        Raises:
            PromptError: a prompt is empty, cannot be read, or is too long for the model with its
                answer.
        """
        check_options(options)
        with self._routing.turn:
            tokens = self._generate(
                self._composer.compose_all(prompts),
                max_new_tokens=max_new_tokens,
                cache=cache,
                seed=seed,
                **options,
            )
            answers = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [str(answer).strip() for answer in answers]

    def stream(
        self, parts: Sequence[Part], *, max_new_tokens: int = 64, **options: Any
    ) -> Iterator[str]:
        """Yield the answer to one prompt piece by piece, as it is generated.

        Options and errors as of `generate_batch`, without beams. Closing the iterator ends the
        generation; on several ranks it runs to its end, since all ranks take every step.
        """

        def generate(receive: Receiver) -> None:
            with self.turn:
                self.generate_rows(
                    [self.embed(parts)], [receive], max_new_tokens=max_new_tokens, **options
                )

        return stream_text(generate, tokenizer=self.tokenizer)

    @torch.inference_mode()
    def generate_rows(
        self,
        embedded: Sequence[PromptInputs],
        receivers: Sequence[Receiver],
        *,
        max_new_tokens: int = 64,
        **options: Any,
    ) -> None:
        """Generate an answer to each prompt and hand its tokens over, one by one.

        Args:
            embedded: what `embed` returned for each prompt.
            receivers: one per prompt, called with each token of its answer in turn, the end token
                included. A prompt's answer ends when its receiver returns False; on several ranks
                it goes on, unheard, since all ranks take every step.
            max_new_tokens: length of the longest answer.
            options: as of `generate_batch`, without beams.

        Raises:
            PromptError: an option is not honoured, or a prompt is too long for the model with its
                answer.
        """
        check_options({key: value for key, value in options.items() if key not in _OWN_OPTIONS})
        if (options.get("num_beams") or 1) > 1:
            raise PromptError(
                "num_beams: an answer of several beams is known at its end only, it cannot be"
                " streamed. Leave it out, or ask without streaming"
            )
        end = options.get("eos_token_id", self.tokenizer.eos_token_id)
        relay = TokenRelay(receivers, end_tokens=end, can_stop=self.group.num_ranks == 1)
        criteria = [*options.pop("stopping_criteria", ()), relay]
        self._generate(
            embedded, max_new_tokens=max_new_tokens, stopping_criteria=criteria, **options
        )

    @torch.inference_mode()
    def generate_tokens(
        self, prompts: Sequence[Sequence[Part]], *, max_new_tokens: int = 64
    ) -> list[list[int]]:
        """Return one greedy answer per prompt as token ids, up to and with the end token.

        Raises:
            PromptError: see `generate_batch`.
        """
        end = self.tokenizer.eos_token_id
        with self.turn:
            composed = self._composer.compose_all(prompts)
            rows = self._generate(composed, max_new_tokens=max_new_tokens).tolist()
        return [row[: row.index(end) + 1] if end in row else row for row in rows]

    @torch.inference_mode()
    def score(
        self, prompts: Sequence[Sequence[Part]], answers: Sequence[Sequence[int]]
    ) -> list[tuple[float, bool]]:
        """Return how likely the model finds an answer (token ids) to each prompt.

        Per prompt: the mean natural log-probability of the answer's tokens, and whether greedy
        decoding gives just this answer.

        Raises:
            PromptError: a prompt or an answer is empty, cannot be read, or they are too long
                together.
        """
        if not prompts or not all(answers):
            raise PromptError(
                "score: give at least one prompt, and an answer of at least one token to each"
            )
        joined = [
            [*parts, Part("ids", list(tokens))]
            for parts, tokens in zip(prompts, answers, strict=True)
        ]
        longest = max(map(len, answers))
        with self._routing.turn:
            logits = self._last_logits(joined, num_answers=list(map(len, answers)))
        logs = torch.log_softmax(logits[:, :-1].to(torch.float32), dim=-1)
        scores = []
        for row, tokens in zip(logs, answers, strict=True):
            answer_logs = row[longest - len(tokens) :]
            target = torch.tensor(tokens, device=row.device)
            likelihood = answer_logs.gather(1, target[:, None]).mean()
            scores.append((float(likelihood), bool((answer_logs.argmax(-1) == target).all())))
        return scores

    def _last_logits(
        self, prompts: Sequence[Sequence[Part]], *, num_answers: Sequence[int]
    ) -> torch.Tensor:
        """Return logits at each answer and the token before, [batch, positions, vocabulary]."""
        composed = self._composer.compose_all(prompts, num_answers=num_answers)
        self.check_length(max(len(prompt.ids) for prompt in composed), 0)
        with self._prefill(composed) as inputs:
            positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            logits: torch.Tensor = self.language_model(
                **inputs,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=max(num_answers) + 1,
            ).logits
        return logits

    def _generate(
        self,
        prompts: Sequence[PromptInputs],
        *,
        max_new_tokens: int,
        cache: Cache = "dynamic",
        seed: int | None = None,
        **options: Any,
    ) -> torch.Tensor:
        if not prompts:
            raise PromptError("no prompt was given")
        if cache not in get_args(Cache):
            raise PromptError(f"expected a cache of {get_args(Cache)}, got {cache!r}")
        check_request(max_new_tokens=max_new_tokens, seed=seed)
        stop = self.tokenizer.eos_token_id
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else stop
        settings = {"do_sample": False, "eos_token_id": stop, "pad_token_id": pad} | options
        if cache == "static":
            settings["cache_implementation"] = "static"
        samples = bool(settings["do_sample"])
        with self._routing.turn:
            self.check_length(max(len(prompt.ids) for prompt in prompts), max_new_tokens)
            with self._prefill(prompts) as inputs, self._draw(seed, samples=samples):
                tokens: torch.Tensor = self.language_model.generate(
                    **inputs, max_new_tokens=max_new_tokens, **settings
                )
        return tokens

    def _draw(self, seed: int | None, *, samples: bool) -> AbstractContextManager[None]:
        share = None if self.group.num_ranks == 1 else self.group.broadcast_object
        return seeded(seed, samples=samples, device=self.device, share=share)

    @property
    def context_tokens(self) -> int | None:
        """Tokens that the model takes, prompt and answer together; None where it does not say."""
        tokens: int | None = getattr(self.language_model.config, "max_position_embeddings", None)
        return tokens

    def check_length(self, num_tokens: int, max_new_tokens: int) -> None:
        """Raise PromptError if prompt and answer are too long together."""
        longest = self.context_tokens
        if longest is not None and num_tokens + max_new_tokens > longest:
            raise PromptError(
                f"the prompt has {num_tokens} tokens and {max_new_tokens} are to be generated; the"
                f" model takes {longest} together. Shorten one of them"
            )


def _find_placeholders(encoders: Mapping[str, Encoder], name: str) -> tuple[str, ...]:
    """Return the texts that may stand for an input of an expert in its chat template."""
    placeholders: tuple[str, ...] = getattr(encoders[name], "placeholders", ())
    return placeholders
