"""What ties this package to others. Nothing here is imported before it is used."""

from unilora_ext.integrations import gguf as gguf
from unilora_ext.integrations import peft as peft
