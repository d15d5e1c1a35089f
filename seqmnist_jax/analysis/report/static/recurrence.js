// An LSTM or GRU that reads one sequence, step by step: what seqmnist_jax.rnn computes, in plain loops.
// Arrays of matrices stand row by row; gates in the order i, f, g, o and r, z, n.

/** The float32 numbers of a base64 text. */
function decodeFloats(text) {
  return new Float32Array(decodeBytes(text).buffer);
}

/** The bytes of a base64 text. */
function decodeBytes(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

/** The network whose weights the page holds as text. */
function decodeNetwork(network) {
  const decode = (arrays) => Object.fromEntries(Object.entries(arrays).map(([name, text]) => [name, decodeFloats(text)]));
  return { ...network, layers: network.layers.map(decode), dense: decode(network.dense) };
}

/** The sequence of an image (its pixels 0 to 255, row by row): one array of numbers a step. */
function makeSequence(view, pixels) {
  const value = (place) => view.scale[pixels[view.order ? view.order[place] : place]];
  return Array.from({ length: view.time }, (_, t) =>
    Float64Array.from({ length: view.features }, (_, k) => value(t * view.features + k)));
}

const sigmoid = (x) => 1 / (1 + Math.exp(-x));

/** sums += vector · matrix. */
function addProduct(sums, vector, matrix) {
  const width = sums.length;
  for (let row = 0, at = 0; row < vector.length; row++, at += width) {
    const factor = vector[row];
    if (factor === 0) continue;
    for (let column = 0; column < width; column++) sums[column] += factor * matrix[at + column];
  }
}

const CELLS = {
  // c' = f c + i g;  h' = o tanh(c')
  lstm(layer, { h, c }, x) {
    const size = h.length;
    const gates = Float64Array.from(layer.bias);
    addProduct(gates, x, layer.kernel);
    addProduct(gates, h, layer.recurrent_kernel);
    for (let k = 0; k < size; k++) {
      const [i, f, o] = [gates[k], gates[size + k], gates[3 * size + k]].map(sigmoid);
      c[k] = f * c[k] + i * Math.tanh(gates[2 * size + k]);
      h[k] = o * Math.tanh(c[k]);
    }
  },

  // n = tanh(x W + b + r (h U + b_U));  h' = (1 - z) n + z h
  gru(layer, { h }, x) {
    const size = h.length;
    const fromX = Float64Array.from(layer.bias);
    const fromH = Float64Array.from(layer.recurrent_bias);
    addProduct(fromX, x, layer.kernel);
    addProduct(fromH, h, layer.recurrent_kernel);
    for (let k = 0; k < size; k++) {
      const r = sigmoid(fromX[k] + fromH[k]);
      const z = sigmoid(fromX[size + k] + fromH[size + k]);
      const n = Math.tanh(fromX[2 * size + k] + r * fromH[2 * size + k]);
      h[k] = (1 - z) * n + z * h[k];
    }
  },
};

function softmax(logits) {
  const largest = Math.max(...logits);
  const powers = logits.map((x) => Math.exp(x - largest));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((x) => x / sum);
}

/**
 * Begins to read a sequence with a decoded network.
 *
 * Of what it gives, `probabilities` [time, classes] and `states` [time, units], the top layer's outputs, hold
 * so far what belongs to the first `done` steps; `advance(count)` reads as many more.
 */
function beginReading(network, sequence) {
  const step = CELLS[network.cell];
  const carries = network.layers.map((layer) => {
    const size = layer.recurrent_kernel.length / layer.bias.length;
    return { h: new Float64Array(size), c: new Float64Array(size) };
  });
  const units = carries[carries.length - 1].h.length;
  const classes = network.dense.bias.length;
  const time = sequence.length;
  const reading = {
    time, units, classes, done: 0,
    probabilities: new Float32Array(time * classes),
    states: new Float32Array(time * units),
    advance(count) {
      for (const end = Math.min(time, reading.done + count); reading.done < end; reading.done++) {
        let x = sequence[reading.done];
        network.layers.forEach((layer, index) => {
          step(layer, carries[index], x);
          x = carries[index].h;
        });
        const logits = Float64Array.from(network.dense.bias);
        addProduct(logits, x, network.dense.kernel);
        reading.states.set(x, reading.done * units);
        reading.probabilities.set(softmax(logits), reading.done * classes);
      }
      return reading;
    },
  };
  return reading;
}
