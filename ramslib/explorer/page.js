// Once per window: names of images and sliders for screen readers; clicks, drags and arrow keys on images.
// An area over an image (Pointer in panels.py) writes what was chosen into the text beside it.
if (!window.ramsExplorer) {
  window.ramsExplorer = true;
  const listen = (type, selector, handler) => document.addEventListener(type, event => {
    const found = event.target.closest && event.target.closest(selector);
    if (found) handler(found, event);
  }, true);
  const name = () => {  // widgets.Image(tooltip=...) is not shown at all by ipywidgets 8.1.9
    for (const image of document.querySelectorAll('.rams img:not([alt])'))
      image.alt = image.closest('.rams-panel')?.querySelector('.rams-title').textContent ?? '';
    for (const part of document.querySelectorAll('.rams :is(.noUi-handle, .widget-readout):not([aria-label])')) {
      const slider = part.closest('.widget-slider');
      part.setAttribute('aria-label', slider.querySelector('.widget-label').textContent);
      if (part.isContentEditable) part.setAttribute('role', 'textbox');
    }
    const titled = '.widget-text, .widget-combobox, .widget-select, .rams-matrix, .rams-thumbnail';
    for (const part of document.querySelectorAll(`.rams :is(${titled}) [title]`))
      part.setAttribute('aria-label', part.title);  // their label is empty, which counts first
  };
  name();
  const changes = {childList: true, subtree: true, attributeFilter: ['title']};
  new MutationObserver(name).observe(document.body, changes);
  document.body.addEventListener('keydown', event => {  // or JupyterLab takes "b" for a new cell
    const isShortcut = event.ctrlKey || event.metaKey || event.altKey;
    if (!isShortcut && event.target.closest('.rams')) event.stopPropagation();
  });
  const limits = area => [+area.dataset.rows, +area.dataset.columns];
  const field = area => area.closest('.rams-pointer').querySelector('input');
  const write = (area, numbers) => {
    const input = field(area);
    input.value = numbers.map(Math.round).join(', ');
    for (const type of ['input', 'change']) input.dispatchEvent(new Event(type, {bubbles: true}));
  };
  const place = (area, event) => {
    const box = area.getBoundingClientRect(), [rows, columns] = limits(area);
    const clamp = share => Math.min(Math.max(share, 0), 1);
    return [rows * clamp((event.clientY - box.top) / box.height),
            columns * clamp((event.clientX - box.left) / box.width)];
  };
  const corners = (a, b) => [Math.min(a[0], b[0]), Math.min(a[1], b[1]),
                             Math.max(a[0], b[0]), Math.max(a[1], b[1])];
  listen('pointerdown', '.rams-area', (area, event) => {
    area.focus();
    area.setPointerCapture(event.pointerId);
    area.start = place(area, event);
    event.preventDefault();
  });
  listen('pointermove', '.rams-area', (area, event) => {
    if (!area.start || !area.dataset.box) return;
    const [rows, columns] = limits(area), box = corners(area.start, place(area, event));
    const share = [box[0] / rows, 1 - box[3] / columns, 1 - box[2] / rows, box[1] / columns];
    area.firstChild.style.inset = share.map(each => `${100 * each}%`).join(' ');
    area.firstChild.hidden = false;
  });
  listen('pointerup', '.rams-area', (area, event) => {
    if (!area.start) return;
    const end = place(area, event), box = corners(area.start, end), start = area.start;
    area.start = null;
    area.firstChild.hidden = true;
    if (!area.dataset.box)
      write(area, end.map((each, axis) => Math.min(Math.floor(each), limits(area)[axis] - 1)));
    else if (box[2] - box[0] > 2 && box[3] - box[1] > 2) write(area, box);
  });
  const steps = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};
  listen('keydown', '.rams-area', (area, event) => {
    const step = steps[event.key], [rows, columns] = limits(area);
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    const old = field(area).value.split(',').map(Number);
    if (!area.dataset.box) {
      const from = old.length == 2 ? old : [-step[0], -step[1]];
      write(area, [0, 1].map(axis => Math.min(Math.max(from[axis] + step[axis], 0),
                                              limits(area)[axis] - 1)));
    } else {  // move by a twentieth of the image; with Shift, move the lower right corner
      const by = [step[0] * rows / 20, step[1] * columns / 20];
      const moved = old.map((each, side) => each + (event.shiftKey && side < 2 ? 0 : by[side % 2]));
      const fits = moved[0] >= 0 && moved[1] >= 0 && moved[2] <= rows && moved[3] <= columns;
      if (fits && moved[2] > moved[0] && moved[3] > moved[1]) write(area, moved);
    }
  });
}
