// A pad to draw a digit on, and what makes of it an image like MNIST's.

const PAD = 280;
const SIDE = 28;

/**
 * The image [28 * 28] of a drawing [size * size], both 0 to 255: scaled so that its longer side is 20 pixels,
 * then placed with its centre of mass in the middle, as MNIST's images were made.
 */
function likeMnist(drawing, size) {
  let [left, right, top, bottom] = [size, -1, size, -1];
  for (let y = 0; y < size; y++) {
    for (let x = 0; x < size; x++) {
      if (drawing[y * size + x] < 32) continue;
      left = Math.min(left, x);
      right = Math.max(right, x);
      top = Math.min(top, y);
      bottom = Math.max(bottom, y);
    }
  }
  if (right < 0) return new Uint8ClampedArray(SIDE * SIDE);
  const scale = Math.max(right - left + 1, bottom - top + 1) / 20;
  // Each small pixel is the mean of what it covers.
  const mean = (fromX, fromY) => {
    let sum = 0;
    const many = Math.max(1, Math.ceil(scale));
    for (let i = 0; i < many; i++) {
      for (let j = 0; j < many; j++) {
        const x = Math.floor(fromX + (j + 0.5) * scale / many);
        const y = Math.floor(fromY + (i + 0.5) * scale / many);
        if (x >= 0 && y >= 0 && x < size && y < size) sum += drawing[y * size + x];
      }
    }
    return sum / many ** 2;
  };
  const sample = (originX, originY) => {
    const image = new Uint8ClampedArray(SIDE * SIDE);
    for (let y = 0; y < SIDE; y++) {
      for (let x = 0; x < SIDE; x++) image[y * SIDE + x] = mean(originX + x * scale, originY + y * scale);
    }
    return image;
  };
  const [middleX, middleY] = [(left + right + 1) / 2, (top + bottom + 1) / 2];
  const centred = sample(middleX - SIDE / 2 * scale, middleY - SIDE / 2 * scale);
  let [mass, sumX, sumY] = [0, 0, 0];
  centred.forEach((value, k) => {
    mass += value;
    sumX += value * (k % SIDE + 0.5);
    sumY += value * (Math.floor(k / SIDE) + 0.5);
  });
  const shiftX = Math.round(sumX / mass - SIDE / 2);
  const shiftY = Math.round(sumY / mass - SIDE / 2);
  return sample(middleX + (shiftX - SIDE / 2) * scale, middleY + (shiftY - SIDE / 2) * scale);
}

/**
 * The pad: draw with a mouse, a finger or a pen; or move its cursor with the arrow keys, paint with the space
 * bar and rub out with the backspace.
 *
 * `changed(pixels)` is called with the image [28 * 28] at each change.
 */
function drawingPad(changed) {
  const canvas = h('canvas', {
    class: 'pad', width: PAD, height: PAD, tabindex: 0, role: 'application', 'aria-roledescription': 'drawing pad',
    'aria-label': 'Draw a digit. Arrow keys move, space paints, backspace rubs out.',
  });
  const ink = canvas.getContext('2d', { willReadFrequently: true });
  const told = h('p', { class: 'hidden', 'aria-live': 'polite' });
  const cursor = { x: 14, y: 14 };
  const marker = h('div', { class: 'marker', hidden: true });
  const centre = h('input', { type: 'checkbox', checked: true, onchange: () => tell() });
  let pending = false;
  let last = null;

  const pixels = () => {
    const { data } = ink.getImageData(0, 0, PAD, PAD);
    const drawing = new Uint8Array(PAD * PAD);
    for (let i = 0; i < drawing.length; i++) drawing[i] = data[4 * i];
    if (centre.checked) return likeMnist(drawing, PAD);
    const image = new Uint8ClampedArray(SIDE * SIDE);
    const cell = PAD / SIDE;
    for (let k = 0; k < image.length; k++) {
      let sum = 0;
      for (let i = 0; i < cell ** 2; i++) sum += drawing[(Math.floor(k / SIDE) * cell + Math.floor(i / cell)) * PAD + k % SIDE * cell + i % cell];
      image[k] = sum / cell ** 2;
    }
    return image;
  };
  const tell = () => {
    if (pending) return;
    pending = true;
    requestAnimationFrame(() => {
      pending = false;
      changed(pixels());
    });
  };
  const clear = () => {
    ink.fillStyle = '#000';
    ink.fillRect(0, 0, PAD, PAD);
    tell();
  };
  const stroke = (from, to, width = 22, color = '#fff') => {
    ink.strokeStyle = color;
    ink.lineWidth = width;
    ink.lineCap = 'round';
    ink.beginPath();
    ink.moveTo(from.x, from.y);
    ink.lineTo(to.x + 0.01, to.y);
    ink.stroke();
    tell();
  };
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return { x: (event.clientX - box.left) / box.width * PAD, y: (event.clientY - box.top) / box.height * PAD };
  };
  canvas.addEventListener('pointerdown', (event) => {
    if (event.button !== 0) return;
    canvas.setPointerCapture(event.pointerId);
    last = place(event);
    stroke(last, last);
  });
  canvas.addEventListener('pointermove', (event) => {
    if (last === null) return;
    for (const one of event.getCoalescedEvents?.() ?? [event]) {
      const next = place(one);
      stroke(last, next);
      last = next;
    }
  });
  for (const end of ['pointerup', 'pointercancel']) canvas.addEventListener(end, () => { last = null; });
  canvas.addEventListener('focus', () => { marker.hidden = !canvas.matches(':focus-visible'); mark(); });
  canvas.addEventListener('blur', () => { marker.hidden = true; });
  const mark = () => { marker.style.transform = `translate(${cursor.x * 100}%, ${cursor.y * 100}%)`; };
  const spot = () => ({ x: (cursor.x + 0.5) * PAD / SIDE, y: (cursor.y + 0.5) * PAD / SIDE });
  canvas.addEventListener('keydown', (event) => {
    const moves = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };
    const move = moves[event.key];
    if (!move && event.key !== ' ' && event.key !== 'Backspace') return;
    event.preventDefault();
    marker.hidden = false;
    if (move) {
      cursor.x = Math.min(SIDE - 1, Math.max(0, cursor.x + move[0]));
      cursor.y = Math.min(SIDE - 1, Math.max(0, cursor.y + move[1]));
      mark();
      told.textContent = `column ${cursor.x + 1}, row ${cursor.y + 1}`;
    } else {
      stroke(spot(), spot(), 22, event.key === ' ' ? '#fff' : '#000');
      told.textContent = event.key === ' ' ? 'painted' : 'rubbed out';
    }
  });
  const load = (digit) => {
    const small = drawDigit(h('canvas'), digit.pixels, SIDE, SIDE);
    ink.imageSmoothingEnabled = false;
    ink.drawImage(small, 0, 0, PAD, PAD);
    tell();
  };
  ink.fillStyle = '#000';
  ink.fillRect(0, 0, PAD, PAD);
  const node = h('div', { class: 'drawing' },
    h('div', { class: 'frame' }, canvas, marker),
    h('div', { class: 'beside' },
      h('p', null, 'Draw one digit, large. With the keyboard: arrow keys move, space paints, backspace rubs out.'),
      h('div', { class: 'buttons' }, h('button', { type: 'button', onclick: clear }, 'Clear')),
      h('label', { class: 'check' }, centre, ' Scale to a box of 20 × 20 and move its centre of mass to the middle, as MNIST did with its digits; others are strange to the network.'),
      told));
  return { node, load };
}
