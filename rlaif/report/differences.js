// How two texts differ, word by word, and both as blocks with these differences marked.

const MOST_CELLS = 4e6; // of the table that compares two texts
const WORDS = /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}]\s*|[\p{L}\p{M}\p{N}_]+(?:['’][\p{L}]+)*\s*|[^]\s*/gu;
const SENTENCES = /[^.!?。！？\n]*(?:[.!?。！？\n]+\s*|$)/gu;

// The units of both texts, for each whether the other has it not, and a note where these are not single words.
function differences(a, b) {
  for (const [pattern, note] of [[WORDS, ""], [SENTENCES, "These texts are long: whole sentences are compared, not words."]]) {
    const units = [a, b].map((text) => (text.match(pattern) || []).filter(Boolean));
    const only = compare(...units);
    if (only) return { units, only, note };
  }
  return { units: [[a], [b]], only: [[0], [0]], note: "These texts are too long for their differences to be marked." };
}

// For the units of each text, 1 where the other has it not: what is left of the longest common subsequence, after what both
// begin and end with; null where the table would be too large.
function compare(left, right) {
  const keys = new Map();
  const number = (word) => {
    const key = word.trimEnd();
    if (!keys.has(key)) keys.set(key, keys.size);
    return keys.get(key);
  };
  const x = left.map(number);
  const y = right.map(number);
  let start = 0;
  while (start < x.length && start < y.length && x[start] === y[start]) start += 1;
  let end = 0;
  while (end < x.length - start && end < y.length - start && x[x.length - 1 - end] === y[y.length - 1 - end]) end += 1;
  const rows = x.length - start - end;
  const columns = y.length - start - end;
  const wide = columns + 1;
  if ((rows + 1) * wide > MOST_CELLS) return null;
  const table = new Uint16Array((rows + 1) * wide);
  for (let i = rows - 1; i >= 0; i -= 1) {
    for (let j = columns - 1; j >= 0; j -= 1) {
      const at = i * wide + j;
      table[at] = x[start + i] === y[start + j] ? table[at + wide + 1] + 1 : Math.max(table[at + wide], table[at + 1]);
    }
  }
  const only = [new Uint8Array(x.length), new Uint8Array(y.length)];
  let i = 0;
  let j = 0;
  while (i < rows || j < columns) {
    const at = i * wide + j;
    if (i < rows && j < columns && x[start + i] === y[start + j]) {
      i += 1;
      j += 1;
    } else if (j >= columns || (i < rows && table[at + wide] >= table[at + 1])) {
      only[0][start + i] = 1;
      i += 1;
    } else {
      only[1][start + j] = 1;
      j += 1;
    }
  }
  return only;
}

// Units with their marks as runs, [text, mark].
function joined(units, marks) {
  const pieces = [];
  units.forEach((unit, n) => {
    const last = pieces[pieces.length - 1];
    if (last && last[1] === marks[n]) last[0] += unit;
    else pieces.push([unit, marks[n]]);
  });
  return pieces;
}

function marked(pieces) {
  const block = make("pre", { class: "text", dir: "auto" });
  for (const [piece, mark] of pieces) {
    const core = piece.trimEnd(); // the space after a marked word is not part of the mark
    if (mark === "gone") block.append(make("del", { title: visible(`left out: ${core}`) }));
    else if (mark) block.append(make("mark", { text: core }), visible(piece.slice(core.length)));
    else block.append(visible(piece));
  }
  return block;
}

// Two texts beside each other, what the other has not marked in each; a side is { name: class, title, text: or null }.
function sideBySide(left, right) {
  const both = left.text !== null && right.text !== null;
  const { units, only, note } = differences(left.text || "", right.text || "");
  const block = (side, n) => make("div", { class: side.name }, make("h4", { text: side.title }),
    both ? marked(joined(units[n], only[n])) : textBlock(side.text));
  return [make("div", { class: "pair" }, block(left, 0), block(right, 1)), both && note ? make("p", { class: "note", text: note }) : null];
}

// A text with what the one before had not marked, and where it had something that is left out; and a note, or null.
function changesIn(before, after) {
  const { units: [old, now], only: [gone, added], note } = differences(before, after);
  const steps = [];
  let i = 0;
  for (let j = 0; j <= now.length; j += 1) {
    for (; i < old.length && gone[i]; i += 1) steps.push([old[i], "gone"]);
    if (j < now.length) {
      steps.push([now[j], added[j] ? "new" : ""]);
      if (!added[j]) i += 1;
    }
  }
  return [marked(joined(steps.map(([unit]) => unit), steps.map(([, mark]) => mark))), note ? make("p", { class: "note", text: note }) : null];
}
