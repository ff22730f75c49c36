"""Prompt and pictures of a bundle, encoded without opening its graphs: what baselines are fed."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from tokenizers import Tokenizer

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.families.preprocessing import Preprocessor, ProcessedImage
from trio_deploy.pipeline.chat import Message
from trio_deploy.pipeline.prompt import Prompt, PromptEncoder


class Inputs:
    """Tokenizer, chat template and preprocessing of a bundle.

    A baseline's memory is that of a process that holds no graph, so it cannot ask a `Pipeline`.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.config = bundle.config
        tokens = {key: token for key, token in bundle.tokens.items() if isinstance(token, str)}
        self._encoder = PromptEncoder(
            Tokenizer.from_file(str(bundle.tokenizer_path)),
            self.config.image_token_id,
            tokens,
            bundle.chat_template,
        )
        self._preprocessor = Preprocessor.from_json(bundle.preprocessor, self.config)

    def encode(
        self, messages: Sequence[Message], pictures: Sequence[Image.Image]
    ) -> tuple[Prompt, list[ProcessedImage]]:
        """As the pipeline encodes a request, the model's context aside."""
        processed = [self._preprocessor(picture) for picture in pictures]
        return self.prompt(messages, [len(picture.rows) for picture in processed]), processed

    def prompt(self, messages: Sequence[Message], rows: Sequence[int]) -> Prompt:
        """The prompt alone, for pictures of as many visual tokens."""
        text = self._encoder.text(messages, len(rows))
        return self._encoder.encode(text, list(rows), rendered=self._encoder.has_template)
