"""What of a model's settings changes while it is served: Ray Serve's `user_config`.

A request keeps the decoder that it came under; those that come later have the new one. No replica starts anew.
"""

from __future__ import annotations

from pydantic import Field

from d3llm_ray.config import DecoderSettings, Settings
from d3llm_ray.decoding import Decoder, choose_decoder
from d3llm_ray.errors import unknown
from d3llm_ray.models import Family
from d3llm_ray.serving.settings import ReplicaSettings


class UserConfig(Settings):
    """`user_config` of a deployment. What it leaves out is as the application's `args` say."""

    decoder: str | None = Field(
        None, min_length=1, description="preset or decoding settings file, instead of args.decoder"
    )
    decoder_settings: DecoderSettings = Field({}, description="settings that override the decoder's")
    adapter: str | None = Field(None, description="one of args.adapters that decodes what is asked of the model itself")

    def adapter_of(self, settings: ReplicaSettings) -> str | None:
        """The model's adapter now, None for the model as it is; `InputError` for one that is not there."""
        if self.adapter is not None and self.adapter not in settings.adapters:
            raise unknown("adapter", self.adapter, settings.adapters)
        return self.adapter

    def decoding(self, settings: ReplicaSettings, family: Family) -> Decoder:
        """The decoder that a model with these `args` has now; `InputError` for one that cannot decode it."""
        if self.decoder is None:
            name, values = settings.decoder, settings.decoder_settings | self.decoder_settings
        else:
            name, values = self.decoder, self.decoder_settings
        decoder = choose_decoder(name, family, **values)
        decoder.check(family)
        return decoder
