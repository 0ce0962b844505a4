"""The parser of snippets.py, on pages that show its rules."""

from tests.docs.snippets import Block, blocks

PAGE = """\
# A page

```python
# shop/jobs.py
a = 1
```

<!-- not run: needs a mail server -->

```python
send()
```

* in a list:

  ```python title="x"
  if a:
      b = 2
  ```

```console
$ sajobs worker
```
"""


def test_blocks() -> None:
    assert blocks(PAGE, "python") == [
        Block("python", "# shop/jobs.py\na = 1\n", line=4, reason=None),
        Block("python", "send()\n", line=11, reason="needs a mail server"),
        Block("python", "if a:\n    b = 2\n", line=17, reason=None),
    ]
    assert [block.code for block in blocks(PAGE, "console")] == ["$ sajobs worker\n"]


def test_a_first_line_may_name_a_file() -> None:
    assert [block.path for block in blocks(PAGE, "python")] == ["shop/jobs.py", None, None]
