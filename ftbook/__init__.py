"""A book that fine-tunes language models, and the library it writes as it goes

ftbook is a book of 27 Jupyter notebooks about fine-tuning language models, and the Python library that these notebooks write. Each lesson explains one idea, builds it in a few lines, runs it on a real model on an ordinary CPU, and compares it with the library that people use for it.

```python
import random, ftbook as ft
from ftbook.data.corpora import load_corpus

model, tokenizer = ft.load_model("smollm2-135m")  # it comes through pip, and so do the reviews
reviews = random.Random(0).sample([r for r in load_corpus("movie") if abs(r["rating"]) > 1], 400)
rows = [{"text": r["text"], "label": "good" if r["rating"] > 0 else "bad"} for r in reviews]
print("before:", ft.evaluate(model, rows[240:], tokenizer=tokenizer))
ft.LoRA(rank=16).apply(model)
ft.finetune(model, rows[:240], tokenizer=tokenizer, lr=1e-3)
print("after:", ft.evaluate(model, rows[240:], tokenizer=tokenizer))
ft.save_adapter(model, "adapter")
```"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
