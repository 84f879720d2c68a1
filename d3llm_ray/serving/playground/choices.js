// What the server offers: models, their decoders, and where a race begins.

const RACERS = ["vanilla", "d3llm", "autoregressive"];
export const MOST_LANES = 3;

/**
 * Models with their decoders, out of the cards of `GET /v1/models`. A server may tell no decoder but its own, or others
 * by their names alone: those have no settings to move.
 */
export function offered(cards) {
  return cards.map((card) => {
    const named = Array.isArray(card.decoders);
    const others = (named ? card.decoders : Object.keys(card.decoders ?? {})).filter((name) => name !== card.decoder);
    const describe = (name, settings) => ({ name, settings, blockSize: settings.block_size ?? blockSize });
    const blockSize = card.decoder_settings.block_size;
    return {
      id: card.id,
      maxTokensLimit: card.max_tokens_limit,
      decoders: [
        { ...describe(card.decoder, card.decoder_settings), usual: true },
        ...others.map((name) => ({ ...describe(name, named ? {} : card.decoders[name]), usual: false })),
      ],
    };
  });
}

/** Two or three lanes to begin a race with, as {model, decoder}; fewer than two where the server has no more. */
export function racers(models) {
  const all = models.flatMap((model) => model.decoders.map(({ name }) => ({ model: model.id, decoder: name })));
  const known = RACERS.map((name) => all.find(({ decoder }) => decoder === name)).filter(Boolean);
  const rest = all.filter((each) => !known.includes(each));
  return known.length > 1 ? known : [...known, ...rest].slice(0, MOST_LANES);
}
