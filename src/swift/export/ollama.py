"""`swift export --to_ollama true`: a Modelfile, from which Ollama imports a model directory as it is.

Owns: the model's chat template in Go's template language, learnt by rendering a few conversations.
Source: https://docs.ollama.com/modelfile and https://docs.ollama.com/template.
"""

import json
from pathlib import Path
from typing import Any

from swift.config.option import ConfigError
from swift.models.directory import read_json
from swift.models.prompts import open_template
from swift.template.chat import ChatTemplate
from swift.template.types import Message
from swift.utils.files import write_text
from swift.utils.log import say

SYSTEM, USER, ANSWER, USER_2 = "zqsystem", "zquser", "zqanswer", "zqmore"
# Ollama's names for settings of generation_config.json.
PARAMETERS = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "repeat_penalty",
}  # fmt: skip
GO_TEMPLATE = """\
{{- $begun := false }}
{{- range .Messages }}
{{- if eq .Role "user" }}
{{- if $begun }}{{ @TO_USER@ }}
{{- else if $.System }}{{ @BEFORE_SYSTEM@ }}{{ $.System }}{{ @AFTER_SYSTEM@ }}
{{- else }}{{ @OPENING@ }}
{{- end }}{{ .Content }}
{{- $begun = true }}
{{- else if eq .Role "assistant" }}{{ @TO_ANSWER@ }}{{ .Content }}
{{- end }}
{{- end }}{{ @PROMPT@ }}"""


def write_modelfile(source: Path, output: Path, run_args: dict[str, Any]) -> None:
    """Writes `output`/Modelfile, which names `source` and answers as the run's own prompts do."""
    system = open_template(source, run_args).system
    template = open_template(source, {k: v for k, v in run_args.items() if k != "system"})
    lines = [f"FROM {source}", f'TEMPLATE """{go_template(template)}"""']
    if system:
        if '"""' in system:
            raise ConfigError('a Modelfile cannot hold a system prompt with """ in it')
        lines.append(f'SYSTEM """{system}"""')
    ends = [template.tokenizer.convert_ids_to_tokens(i) for i in template.stop_token_ids]
    lines += [f"PARAMETER stop {json.dumps(end, ensure_ascii=False)}" for end in ends]
    generation = source / "generation_config.json"
    known = read_json(generation) if generation.is_file() else {}
    if known.get("do_sample") is False:
        known["temperature"] = 0
    lines += [f"PARAMETER {PARAMETERS[k]} {known[k]}" for k in PARAMETERS if known.get(k) is not None]
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "Modelfile", "\n".join(lines) + "\n")
    say(f"wrote {output / 'Modelfile'}; next: ollama create NAME -f {output / 'Modelfile'}")


def go_template(template: ChatTemplate) -> str:
    """The template in Go, for conversations without tools. ConfigError where it is no plain row of turns."""
    opening, to_answer, to_user, prompt = cut(template, USER, ANSWER, USER_2)
    before_system, after_system, last = cut(template, SYSTEM, USER)
    whole = cut(template, SYSTEM, USER, ANSWER, USER_2)
    expected = [before_system, after_system, to_answer, to_user, prompt]
    if whole != expected or cut(template, USER) != [opening, prompt] or last != prompt:
        raise ConfigError("--to_ollama: the model's chat template is no plain row of turns")
    pieces = {
        "TO_USER": to_user, "BEFORE_SYSTEM": before_system, "AFTER_SYSTEM": after_system,
        "OPENING": opening, "TO_ANSWER": to_answer, "PROMPT": prompt,
    }  # fmt: skip
    text = GO_TEMPLATE
    for name, words in pieces.items():
        text = text.replace(f"@{name}@", json.dumps(words, ensure_ascii=False))  # also a string of Go
    return text


def cut(template: ChatTemplate, *words: str) -> list[str]:
    """The pieces of the prompt for a conversation of these words, around them."""
    roles = {SYSTEM: "system", ANSWER: "assistant"}
    chat: list[Message] = [{"role": roles.get(word, "user"), "content": word} for word in words]
    pieces, text = [], template.prompt(chat)
    for word in words:
        before, found, text = text.partition(word)
        if not found:
            raise ConfigError("--to_ollama: the model's chat template does not show what is said")
        pieces.append(before)
    return [*pieces, text]
