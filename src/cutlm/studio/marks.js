// Passages of a response: spans in characters (code points, as in records), the pieces that they cover, and changes.

/** The span [start, end) of each piece, in code points of the response, without white space around it. */
export function locatePieces(side) {
  let reached = 0;
  return side.pieces.map((text) => {
    const length = [...text].length;
    const lead = [...text.slice(0, text.length - text.trimStart().length)].length;
    const trail = [...text.slice(text.trimEnd().length)].length;
    const start = reached;
    reached += length;
    return lead === length ? [start, reached] : [start + lead, reached - trail];
  });
}

/** Whether a span covers a piece; an empty one covers what starts there, and the end of the response at its end. */
export function covers([left, right], [start, end]) {
  return left < right ? start < right && end > left : start <= left && left < Math.max(end, start + 1);
}

const isTouching = ([left, right], [start, end]) => left === right || start === end ? left === start && right === end : left <= end && start <= right;

/** The spans and one more, joined with those that it touches. */
export function addSpan(spans, span) {
  const joined = spans.filter((other) => isTouching(other, span));
  const all = [...joined, span];
  const merged = [Math.min(...all.map(([start]) => start)), Math.max(...all.map(([, end]) => end))];
  return [...spans.filter((other) => !joined.includes(other)), merged].sort(([one], [other]) => one - other);
}

/** The spans without those that overlap a passage. */
export function removeSpans(spans, passage) {
  return spans.filter((span) => !covers(span, passage) && !covers(passage, span));
}

/** The first and the last piece of a box that the selection of the browser touches; null without any. */
export function findSelected(box, elements) {
  const selection = getSelection();
  if (!selection.rangeCount || selection.isCollapsed) return null;
  const range = selection.getRangeAt(0);
  if (!box.contains(range.commonAncestorContainer) && box !== range.commonAncestorContainer) return null;
  const inside = elements.map((element, index) => [element, index]).filter(([element]) => {
    if (!range.intersectsNode(element)) return false;
    const own = document.createRange();
    own.selectNodeContents(element);
    // Touching only at a boundary selects nothing of the element.
    return (
      range.compareBoundaryPoints(Range.END_TO_START, own) < 0 && range.compareBoundaryPoints(Range.START_TO_END, own) > 0
    );
  });
  return inside.length ? [inside[0][1], inside.at(-1)[1]] : null;
}
