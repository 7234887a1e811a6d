"""Write expected.json beside this file: what the installed transformers renders; null where it raises.

The day on which it renders, which a template may tell a model, stands there as {today}.
"""

import copy
import datetime
import json
from pathlib import Path

import transformers
from transformers.utils.chat_template_utils import render_jinja_template

HERE = Path(__file__).parent


def rendered(template, conversation):
    """The text of a conversation, or None."""
    arguments = copy.deepcopy(conversation)
    messages = [arguments.pop("messages")]
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    try:
        texts, _ = render_jinja_template(conversations=messages, chat_template=template, **tokens, **arguments)
    except Exception:  # whatever a template raises
        return None
    return texts[0].replace(datetime.date.today().isoformat(), "{today}")


def main():
    """Render every template; several versions must agree."""
    conversations = json.loads((HERE / "conversations.json").read_text())
    texts = {
        path.stem: {name: rendered(path.read_text(), each) for name, each in conversations.items()}
        for path in sorted(HERE.glob("*.jinja"))
    }
    file = HERE / "expected.json"
    before = json.loads(file.read_text()) if file.exists() else {"texts": None, "transformers": []}
    versions = before["transformers"] if before["texts"] == texts else []
    versions = sorted({*versions, transformers.__version__})
    file.write_text(json.dumps({"transformers": versions, "texts": texts}, indent=1, ensure_ascii=False) + "\n")
    print(versions)


if __name__ == "__main__":
    main()
