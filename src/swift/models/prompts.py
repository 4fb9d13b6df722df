"""What a run knows about its prompts, written into the files of a model, where other programs look for it.

Owns: the chat template with system prompt and thinking switch, in the tokenizer's files.
Not here: that template itself (template/specs.py), args.json, from which our own commands take the same.
"""

from pathlib import Path
from typing import Any

from swift.config.template import TemplateConfig
from swift.models.directory import read_json
from swift.models.load import load_tokenizer
from swift.template.chat import ChatTemplate
from swift.utils.files import write_json, write_text
from swift.utils.log import say, warn

TOKENIZER_CONFIG, TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"
SETTINGS = ("system", "enable_thinking", "use_chat_template", "response_prefix")


def open_template(directory: Path, run_args: dict[str, Any]) -> ChatTemplate:
    """The chat template of a directory's tokenizer with the settings of the run that made the weights."""
    settings = {name: run_args[name] for name in SETTINGS if run_args.get(name) is not None}
    return ChatTemplate(load_tokenizer(directory), TemplateConfig(**settings))


def carry_template(directory: Path, run_args: dict[str, Any]) -> dict[str, Any]:
    """Replaces the tokenizer's files that hold the template; none where nothing would change.

    Gives the run's args with the text of a system prompt that was read from a file.
    """
    template = open_template(directory, run_args)
    own = template.tokenizer.chat_template
    whole = run_args | ({"system": template.system} if template.system else {})
    if own and not any(run_args.get(name) is not None for name in SETTINGS):
        return whole
    source = template.deployed()
    if template.response_prefix:
        warn("--response_prefix is no part of a chat template: other programs have to send it")
    if source == own:
        return whole
    config = read_json(directory / TOKENIZER_CONFIG) if (directory / TOKENIZER_CONFIG).is_file() else {}
    if "chat_template" in config:  # read by programs that do not know the file
        write_json(directory / TOKENIZER_CONFIG, config | {"chat_template": source})
    write_text(directory / TEMPLATE_FILE, source)
    say("the chat template holds the system prompt and settings of the training")
    return whole
