// Browsers start no worker from a page that lies on a disk, and the search runs in one. There a
// hidden frame runs the same script instead: it is sent messages and answers like a worker.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.onmessage = null;
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.inside = frame.contentWindow;
      this.loaded = new Promise((resolve) => {
        const page = frame.contentDocument;
        const script = page.createElement("script");
        this.inside.postMessage = (data) => this.answer(data);
        script.src = url;
        script.onload = resolve;
        page.head.append(script);
      });
    }

    answer(data) {
      const event = new MessageEvent("message", { data });
      this.dispatchEvent(event);
      this.onmessage?.(event);
    }

    async postMessage(data) {
      await this.loaded;
      this.inside.dispatchEvent(new MessageEvent("message", { data }));
    }
  };
}
