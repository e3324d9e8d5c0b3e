"""What children are forked from: all imported that labelling over HTTP needs."""

from importlib import import_module

import openai

from rlaif.cli import command_line

for name in ("rlaif.engines.openai", "rlaif.engines.mock", "rlaif.job", "rlaif.labeler"):
    import_module(name)
command_line()
openai.OpenAI(api_key="none", base_url="http://127.0.0.1").close()  # imports what it needs only when it is made
