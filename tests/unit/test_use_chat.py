"A talk in the terminal."

from ftbook.use.chat import Chat


def test_a_talk_ends_with_an_empty_question(monkeypatch, capsys):
    asked = iter(["Is it good?", " Is it new? ", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(asked))
    monkeypatch.setattr(Chat, "_write", lambda self, row: row["prompt"][0]["content"].upper())
    talk = Chat(model=None, tokenizer=None)
    talk.talk()
    assert [o["question"] for o in talk.turns] == ["Is it good?", "Is it new?"]
    assert capsys.readouterr().out == "tuned: IS IT GOOD?\ntuned: IS IT NEW?\n"
