"""What an export says about prompts: the chat template with the run's settings, and the Modelfile."""

import json
import re
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from conftest import make_tiny_tokenizer
from swift.config.option import ConfigError, build
from swift.config.runs import ExportRun
from swift.config.template import TemplateConfig
from swift.export.ollama import go_template
from swift.export.run import run_export
from swift.models.prompts import carry_template
from swift.template.chat import ChatTemplate

TEMPLATES = Path(__file__).parents[1] / "data" / "chat_templates"
FAMILIES = sorted(path for path in TEMPLATES.glob("*.jinja"))
# Shows no system messages, as Gemma's.
FOLDING = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = 'Say "hi" in {{ one }} line,\nor two; 你好 \\ {% endif %}.'
U, A, V = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("user", "and {{ x")))
CHATS = ([U], [U, A, V], [{"role": "system", "content": "Own."}, U, A, V])


def load(path: Path, source: str | None, **settings: object) -> ChatTemplate:
    return ChatTemplate(AutoTokenizer.from_pretrained(save(path, source)), TemplateConfig(**settings))


def save(path: Path, source: str | None) -> Path:
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = source
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("family", [*FAMILIES, "folding", "none"], ids=lambda f: getattr(f, "stem", f))
def test_plain_transformers_renders_our_prompts(family, tmp_path: Path) -> None:
    sources = {"folding": FOLDING, "none": None}
    source = sources[family] if isinstance(family, str) else family.read_text()
    settings = {"system": SYSTEM, "enable_thinking": False}
    ours = load(tmp_path / "a", source, **settings)
    carry_template(save(tmp_path / "b", source), settings)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert theirs.chat_template != source
    for chat in CHATS:
        text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        # Some templates print the date of the day, ours a fixed one.
        assert re.sub(r"Today Date: .*", "", text) == re.sub(r"Today Date: .*", "", ours.prompt(chat))
    assert SYSTEM in ours.prompt([U])
    # Read by us with the same settings, and exported again, it stays what it is.
    again = ChatTemplate(theirs, TemplateConfig(**settings))
    assert [again.prompt(chat) for chat in CHATS] == [ours.prompt(chat) for chat in CHATS]
    assert again.deployed() == theirs.chat_template


def test_a_template_in_the_tokenizers_config_is_replaced_too(tmp_path: Path) -> None:
    """Programs that know only one of the two places read the same."""
    save(tmp_path, FOLDING)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": FOLDING}))
    before = (tmp_path / "tokenizer.json").read_bytes()
    carry_template(tmp_path, {"model": "m", "system": None})
    assert not (tmp_path / "chat_template.jinja").exists()  # nothing to say
    (tmp_path / "system.txt").write_text("Be brief.\n")
    assert carry_template(tmp_path, {"system": str(tmp_path / "system.txt")}) == {"system": "Be brief."}
    written = (tmp_path / "chat_template.jinja").read_text()
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == written
    assert "Be brief." in written and (tmp_path / "tokenizer.json").read_bytes() == before


def run_go(source: str, chat: list[dict[str, str]]) -> str:
    """What Go's text/template makes of the one program that go_template writes, for Ollama's .Messages.

    The program itself was compared with Go 1.27's own output for the templates of tests/data.
    """
    texts = [json.loads(text) for text in re.findall(r'\{\{ ("(?:[^"\\]|\\.)*") \}\}', source)]
    to_user, before_system, after_system, opening, to_answer, prompt = texts
    system = next((m["content"] for m in chat if m["role"] == "system"), "")
    out, begun = "", False
    for message in chat:
        if message["role"] == "user":
            first = before_system + system + after_system if system else opening
            out += (to_user if begun else first) + message["content"]
            begun = True
        elif message["role"] == "assistant":
            out += to_answer + message["content"]
    return out + prompt


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.stem)
def test_ollama_renders_our_prompts(family: Path, tmp_path: Path) -> None:
    template = load(tmp_path, family.read_text())
    source = go_template(template)
    assert re.sub(r'"(?:[^"\\]|\\.)*"', "S", source) == (
        "{{- $begun := false }}\n{{- range .Messages }}\n{{- if eq .Role S }}\n"
        "{{- if $begun }}{{ S }}\n{{- else if $.System }}{{ S }}{{ $.System }}{{ S }}\n{{- else }}{{ S }}\n"
        "{{- end }}{{ .Content }}\n{{- $begun = true }}\n{{- else if eq .Role S }}{{ S }}{{ .Content }}\n"
        "{{- end }}\n{{- end }}{{ S }}"
    )
    for chat in CHATS:
        assert run_go(source, chat) == template.prompt(chat)


def test_a_modelfile_names_the_model_and_its_settings(tiny_llama_dir: Path, tmp_path: Path, capfd) -> None:
    model = shutil.copytree(tiny_llama_dir, tmp_path / "model")
    (model / "args.json").write_text(json.dumps({"system": "Be brief."}))
    assert run_export(build(ExportRun, {"model": str(model), "to_ollama": True})) == 0
    lines = (tmp_path / "model-ollama" / "Modelfile").read_text().splitlines()
    assert lines[0] == f"FROM {model}" and lines[1] == 'TEMPLATE """{{- $begun := false }}'
    assert lines[-3:] == ['SYSTEM """Be brief."""', 'PARAMETER stop "<|im_end|>"', "PARAMETER temperature 0"]
    assert f"ollama create NAME -f {tmp_path / 'model-ollama' / 'Modelfile'}" in capfd.readouterr().err
    with pytest.raises(ConfigError, match="exists and is not empty"):
        run_export(build(ExportRun, {"model": str(model), "to_ollama": True}))
    assert run_export(build(ExportRun, {"model": str(model), "to_ollama": True, "exist_ok": True})) == 0
    save(model, "{% for m in messages %}{{ m['content'] }}{{ loop.index }}{% endfor %}")
    with pytest.raises(ConfigError, match="no plain row of turns"):
        run_export(build(ExportRun, {"model": str(model), "to_ollama": True, "exist_ok": True}))


def test_adapters_are_copied_as_peft_reads_them(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    kept = {"adapter_config.json": "{}", "adapter_model.safetensors": "x", "args.json": "{}"}
    for name, text in {**kept, "trainer_state.json": "{}", "optimizer.bin": "x"}.items():
        (checkpoint / name).write_text(text)
    assert run_export(build(ExportRun, {"adapters": (str(checkpoint),), "to_peft_format": True})) == 0
    copied = {file.name: file.read_text() for file in (tmp_path / "checkpoint-3-peft").iterdir()}
    assert copied == kept
