// One answer as it came: its reveal events with their times, and what the canvas was after any number of them.

/** A recording of one answer. Times are milliseconds since the request was sent, as this page saw them. */
export class Recording {
  constructor({ name, maxTokens, blockSize }) {
    this.name = name;
    this.maxTokens = maxTokens;
    this.expectedBlock = blockSize;
    this.events = []; // {at, forward, positions, text, entropy, size, block_size, opened, frozen}
    this.text = "";
    this.usage = null;
    this.finishReason = null;
    this.error = null; // a Refusal
    this.state = "waiting"; // then running, and at last done, stopped or failed
    this.endedAt = null;
  }

  add(chunk, at) {
    if (chunk.diffusion) this.events.push({ at, ...chunk.diffusion });
    if (chunk.usage) this.usage = chunk.usage;
    for (const choice of chunk.choices) {
      this.text += choice.delta.content ?? "";
      this.finishReason = choice.finish_reason ?? this.finishReason;
    }
  }

  end(state, at, error = null) {
    this.state = state;
    this.endedAt = at;
    this.error = error;
  }

  /** The canvas after the first `count` events. */
  canvas(count = this.events.length) {
    const { size, blockSize, head } = this.#layout();
    const cells = new Array(size).fill(null);
    for (const event of this.events.slice(0, count)) {
      event.positions.forEach((position, index) => {
        cells[position] = { text: event.text[index], entropy: event.entropy[index], forward: event.forward };
      });
    }
    const last = this.events[count - 1];
    const ended = this.state === "done" && count === this.events.length;
    const extent = { opened: last?.opened ?? 0, frozen: last?.frozen ?? 0, ended };
    return { cells, blocks: blocksOf(cells, blockSize, head, extent), ...extent };
  }

  /** Figures after the first `count` events; at the end of a whole answer they are the server's own. */
  figures(count = this.events.length) {
    const last = this.events[count - 1];
    const whole = this.usage && count === this.events.length;
    const forwards = whole ? this.usage.forwards : last ? last.forward + 1 : 0;
    const tokens = whole ? this.usage.completion_tokens : committedTokens(this.canvas(count).cells, this.maxTokens);
    const seconds = (whole ? this.endedAt ?? last.at : last?.at ?? 0) / 1000;
    return { forwards, tokens, seconds, perForward: tokens / forwards || 0, perSecond: tokens / seconds || 0 };
  }

  /** Before the first event: what the request asks for, in whole blocks. */
  #layout() {
    const event = this.events[0];
    if (!event) {
      const size = Math.ceil(this.maxTokens / this.expectedBlock) * this.expectedBlock;
      return { size, blockSize: this.expectedBlock, head: 0 };
    }
    // Blocks that are aligned to the prompt begin with a part of one. What is opened ends where a block does.
    const { size, block_size: blockSize } = event;
    const inside = this.events.find((each) => each.opened < size);
    return { size, blockSize, head: (inside?.opened ?? 0) % blockSize };
  }
}

/** Blocks as {start, end, state}. A decoder of one token a block has no blocks to show. */
function blocksOf(cells, blockSize, head, { opened, frozen, ended }) {
  if (blockSize === 1) return [{ start: 0, end: cells.length, state: ended ? "done" : opened ? "open" : "waiting" }];
  const bounds = [];
  for (let start = head ? head - blockSize : 0; start < cells.length; start += blockSize) {
    bounds.push([Math.max(start, 0), Math.min(start + blockSize, cells.length)]);
  }
  return bounds.map(([start, end]) => {
    let state = "waiting";
    if (frozen >= end) state = "frozen";
    else if (cells.slice(start, end).every(Boolean)) state = "done";
    else if (ended) state = "unused"; // the answer ended before it
    else if (opened > start) state = "open";
    return { start, end, state };
  });
}

/** Tokens of the answer that are certain: the revealed beginning, up to the first special token. */
function committedTokens(cells, maxTokens) {
  let count = 0;
  while (count < Math.min(cells.length, maxTokens) && cells[count] && !isSpecial(cells[count].text)) count += 1;
  return count;
}

/** Whether a token's text is the name of a special token, such as <|endoftext|> or </s>. */
export function isSpecial(text) {
  return /^<(\|[^|<>]+\|?|｜[^｜<>]+｜|\/?(s|bos|eos|pad|unk|mask|sep|cls))>$/i.test(text);
}
