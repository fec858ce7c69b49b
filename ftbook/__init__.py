"""Fine-tune language models, and understand every line that does it.

What people type is here, and each name is imported when it is first used:

    import ftbook as ft

    ft.run("reviews.csv")                                       # from a file to a report
    model, tokenizer = ft.load_model("smollm2-135m")
    ft.LoRA(rank=16).apply(model)
    ft.finetune(model, "reviews.csv", tokenizer=tokenizer, eval_rows=0.1)
    ft.evaluate(model, "reviews.csv", tokenizer=tokenizer)
    ft.save_adapter(model, "adapter")

The file `__init__.pyi` beside this one says where each name lives. The book explains them: lessons in nbs/, and how
the library does it in nbs/inside/.
"""
import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
