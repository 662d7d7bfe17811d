// What the words on the page mean: told on hover, to screen readers, and in the details. Pure: no DOM.
"use strict";

const MEANINGS = {
  input: "an input of the model",
  parameter: "a parameter of the model",
  buffer: "a buffer of the model",
  tangent: "what the loss sends back: the gradient of an output of the model",
  output: "a result of the step: an output of the model, the gradient of a parameter, or the new value of a buffer",
  contraction: "a sum of products: a convolution, a matrix product, or the gradient of one",
  quantizer: "a quantizer: turns a tensor into codes, with one scale for each block",
  operator: "an operator that is not quantized",
  saved: "a tensor that forward keeps for backward, with its bytes",
  key: "two numbers, drawn once a step, that all random bits of the step come from (stochastic rounding); backward draws from them too",
  rotation: "an orthogonal rotation of an operand before it is quantized",
  range: "the range that a quantizer keeps between steps",
};

/** What the entries of the legend stand for. */
const ENTRIES = {
  weight: "quantizers of operands that are computed from parameters alone",
  activation: "quantizers of operands that flow forward",
  gradient: "quantizers of operands that flow backward",
  output: "quantizers of results of forward contractions",
  contraction: MEANINGS.contraction,
  kept: "contractions with an operand in float; the details say why",
  operator: MEANINGS.operator,
  saved: "tensors that forward keeps for backward, with their bytes",
  ends: "what enters and leaves a step: inputs, parameters, outputs, gradients",
};
const HEAT_ENTRY = "quantizers with this figure of the debugger";

/** What a shape is, in a sentence or two. */
function shapeWords(shape) {
  const meaning = MEANINGS[shape.kind] || shape.kind, name = shape.details.name;
  if (shape.kind === "quantizer") return `${name}: ${meaning}. Format ${shape.details.format}, block ${shape.details.block}, role ${shape.role}`;
  if (shape.kind === "contraction") return `${name || shape.label}: ${meaning}` + (shape.kept ? `. In float: ${shape.kept}` : "");
  if (shape.kind === "operator") return `${shape.details.op}: ${meaning}`;
  if (shape.kind === "saved") return `${shape.label}: ${meaning}; of ${shape.details.tensor}`;
  return `${name || shape.label}: ${meaning}`;
}

const LANES = ["forward", "saved for backward", "backward"];

/** What a module is, in one lane. */
function boxWords(box, lane, isOpen) {
  const what = lane === 1 ? savedWords(box.sum) + " that forward keeps for backward" : LANES[lane];
  return `module ${box.path}, ${what}. Click or Enter to ${isOpen ? "fold" : "unfold"}`;
}

const savedWords = sum => human(sum.bytes) + ", " + plural(sum.saved, "tensor");
