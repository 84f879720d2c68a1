// What the server offers: models, their decoders, and where a race begins.

const RACERS = ["vanilla", "d3llm", "autoregressive"];
export const MOST_LANES = 3;

// What is assumed of a model that tells nothing yet, as none of its replicas runs; asking it starts one.
const UNTOLD = { decoder: "its own", decoder_settings: { block_size: 32 }, max_tokens_limit: 128 };

/** Models with their decoders, out of the cards of `GET /v1/models`: the server's own decoder first. */
export function offered(cards) {
  return cards.map((told) => {
    const card = { ...UNTOLD, ...told };
    const settingsOf = { [card.decoder]: card.decoder_settings, ...card.settings_by_decoder };
    const decoders = Object.entries(settingsOf).map(([name, settings]) => ({
      name,
      settings,
      blockSize: settings.block_size,
      usual: name === card.decoder,
    }));
    return { id: card.id, maxTokensLimit: card.max_tokens_limit, decoders };
  });
}

/** Two or three lanes to begin a race with, as {model, decoder}; fewer than two where the server has no more. */
export function racers(models) {
  const all = models.flatMap((model) => model.decoders.map(({ name }) => ({ model: model.id, decoder: name })));
  const known = RACERS.map((name) => all.find(({ decoder }) => decoder === name)).filter(Boolean);
  const rest = all.filter((each) => !known.includes(each));
  return known.length > 1 ? known : [...known, ...rest].slice(0, MOST_LANES);
}
