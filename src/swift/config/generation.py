"""How answers are sampled, and what inference does with them."""

from dataclasses import dataclass

from swift.config.option import ConfigError, option


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationConfig:
    max_new_tokens: int | None = option(None, "longest answer; none = all the context", unit="tokens", min=1)
    temperature: float | None = option(None, "0 = greedy; none = generation_config.json", min=0)
    top_p: float | None = option(None, "nucleus; none = generation_config.json", range=(0, 1))
    top_k: int | None = option(None, "most likely tokens kept; none = generation_config.json")
    repetition_penalty: float | None = option(None, "none = generation_config.json", min=0)
    stream: bool | None = option(None, "show tokens as they come; none = in a chat yes, for a dataset no")
    stop_words: tuple[str, ...] = option((), "texts that end an answer, besides the template's own")
    seed: int = option(42, "seed of sampling")

    def check(self) -> None:
        """Raises ConfigError for bounds that the flags' own ranges cannot say."""
        if self.repetition_penalty == 0:
            raise ConfigError("--repetition_penalty must be above 0, got 0", hint="1 = no penalty")
        if self.top_k is not None and self.top_k < -1:
            raise ConfigError(f"--top_k must be at least -1, got {self.top_k}", hint="-1 = all tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class InferOptions:
    adapters: tuple[str, ...] = option((), "checkpoint with adapters; its args.json names the model")
    load_args: bool = option(True, "take model, system prompt and template from the checkpoint's args.json")
    load_data_args: bool = option(False, "answer the rows that the training run held out")
    infer_backend: str = option("transformers", "engine", choices=("transformers", "pt", "vllm"))
    val_dataset: tuple[str, ...] = option((), "answer these rows instead of opening a chat")
    val_dataset_sample: int | None = option(None, "answer only this many rows", min=1)
    columns: dict[str, str] = option({}, 'renames columns, as JSON: {"old": "new"}')
    strict: bool = option(False, "stop at the first row that cannot be used")
    dataset_shuffle: bool = option(True, "shuffle the rows before #N takes its share")
    data_seed: int | None = option(None, "seed of #N; none = --seed")
    result_path: str | None = option(None, "JSONL of the answers; none = infer_result/ beside the checkpoint")
    write_batch_size: int = option(1000, "rows between writes; -1 = only at the end", unit="rows")
    max_batch_size: int | None = option(
        None, "rows together; none = 64, on a GPU 256, or 8 padded", unit="rows", min=1
    )
    merge_lora: bool = option(False, "fold the adapters into the weights in memory: faster answers")
    logprobs: bool = option(False, "write the log-probability of each token into the result rows")
    top_logprobs: int | None = option(
        None, "most likely tokens told beside each; needs --logprobs", unit="tokens", range=(1, 20)
    )
    metric: str | None = option(None, "compares answers with the rows' own", choices=("acc",))

    def check(self) -> None:
        if self.top_logprobs and not self.logprobs:
            raise ConfigError("--top_logprobs has no effect without --logprobs true")
        if self.logprobs and not (self.val_dataset or self.load_data_args):
            raise ConfigError("--logprobs is written with rows", hint="name some with --val_dataset")
        if self.merge_lora and not self.adapters:
            raise ConfigError(
                "--merge_lora needs --adapters", hint="name a checkpoint directory with adapters"
            )
