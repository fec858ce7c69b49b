"""Which public names does a check depend on? Data flow, read from the code of pages and tests without running it.

A page is read cell by cell with one set of variables, a test function with the fixtures that it names. A variable carries the
public names that made it, or changed it in place. An assertion, a function of `fastcore.test`, `pytest.raises` and a helper
that asserts check all that their arguments carry. A method counts where its receiver carries its class, which comes from a
call of the class, or from a function whose return is annotated with it.
"""

import ast, importlib, inspect, re, textwrap
from dataclasses import dataclass, field
from functools import cache

from book import inside, lessons, modules, read_cells, root

magic = re.compile(r"^[!%].*", re.M)


@dataclass
class Names:
    "The public names, and what is known of them."

    things: dict = field(default_factory=dict)  # 'Class', 'function' or 'Class.method' -> object
    gives: dict = field(default_factory=dict)  # The same -> classes that its return is annotated with
    bases: dict = field(default_factory=dict)  # Class -> all classes it inherits from, itself first
    classes: dict = field(default_factory=dict)  # Class -> the object


def annotated(o, classes):
    "Public classes in the annotation of a return."
    said = getattr(o, "__annotations__", {}).get("return", "")
    return set(re.findall(r"\w+", said if isinstance(said, str) else getattr(said, "__name__", str(said)))) & classes


@cache
def public() -> Names:  # Of all modules
    "Collect the public functions, classes and methods."
    found, everything = Names(), {}
    for name in modules():
        module = importlib.import_module(f"ftbook.{name}")
        for label, o in vars(module).items():
            if getattr(o, "__module__", "") == module.__name__ and inspect.isclass(o):
                everything[label] = o
        for label in module.__all__:
            o = inspect.unwrap(getattr(module, label))
            if getattr(o, "__module__", None) == module.__name__ and (inspect.isfunction(o) or inspect.isclass(o)):
                found.things[label] = o
    classes = set(everything)
    found.classes = everything
    for label, o in everything.items():
        found.bases[label] = [k.__name__ for k in o.__mro__ if k.__name__ in classes]
        for k, v in vars(o).items():
            f = v.__func__ if isinstance(v, (classmethod, staticmethod)) else v.fget if isinstance(v, property) else v
            if k[0] != "_" and inspect.isfunction(f):
                found.gives[f"{label}.{k}"] = annotated(f, classes) | ({label} if isinstance(v, classmethod) else set())
                if label in found.things and inspect.isfunction(v):
                    found.things[f"{label}.{k}"] = v
        found.gives[label] = {label}
    for name in modules():  # what is not public gives classes too
        module = importlib.import_module(f"ftbook.{name}")
        for label, o in vars(module).items():
            if inspect.isfunction(o := inspect.unwrap(o)) and o.__module__ == module.__name__:
                found.gives[label] = found.gives.get(label, set()) | annotated(o, classes)
    return found


checking = re.compile(r"test_\w+|pytest\.(raises|warns)|(torch|np)\.testing\.\w+")


def dotted(node):
    "A name with its dots; '' for anything else."
    if isinstance(node, ast.Name):
        return node.id
    owner = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{owner}.{node.attr}" if owner else ""


def is_check(node):
    "Is it a call of `fastcore.test`, of `pytest.raises`, or of torch's or NumPy's testing?"
    return isinstance(node, ast.Call) and bool(checking.fullmatch(dotted(node.func)))


def asserts(tree):
    "Is there an assertion in a piece of code?"
    return any(isinstance(o, ast.Assert) or is_check(o) for o in ast.walk(tree))


def calls(statements):
    return [o for s in statements for o in ast.walk(s) if isinstance(o, ast.Call)]


class Flow:
    "Variables with what they carry, and what was checked."

    def __init__(self, helpers=None, variables=None):
        self.helpers = dict(helpers or {})  # Name -> function definition
        self.carries = dict(variables or {})  # Variable -> names
        self.checked = set()
        self.seen = {}  # Helper -> (what it carries, what it checks)
        self.made_from = {}  # Variable -> variables that stand in what it was made of

    # Expressions

    def of(self, node) -> set:
        "What an expression carries."
        if node is None:
            return set()
        if isinstance(node, ast.Name):
            return self.of_name(node.id)
        if isinstance(node, ast.Call):
            return self.of_call(node)
        if isinstance(node, ast.Attribute):
            owner = self.of(node.value)
            if isinstance(node.value, ast.Name) and not owner:  # module.name
                return self.of_name(node.attr) if node.attr in public().gives else set()
            return owner | self.of_member(owner, node.attr)
        if isinstance(node, ast.NamedExpr):
            value = self.of(node.value)
            self.give(node.target, value)
            return value
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)):
            for g in node.generators:
                self.give(g.target, self.of(g.iter))
        return set().union(
            *(
                self.of(o)
                for o in ast.iter_child_nodes(node)
                if isinstance(o, (ast.expr, ast.comprehension, ast.keyword))
            )
        )

    def of_name(self, name):
        found = set(self.carries.get(name, ()))
        if name in self.helpers:
            return found | self.inside_of(name)
        if name in public().gives:
            found |= {name} | public().gives[name]
        return found

    def inside_of(self, name):
        "What a helper carries: all that its body calls."
        node = self.helpers[name]
        if node not in self.seen:
            self.seen[node] = set(), set()  # for one that calls itself
            inner = Flow(self.helpers, self.carries)
            inner.seen = self.seen
            inner.body(node.body)
            returned = [o.value for o in ast.walk(node) if isinstance(o, (ast.Return, ast.Yield))]
            carried = set().union(*map(inner.of, [*calls(node.body), *returned]), set())
            self.seen[node] = carried, inner.checked
        carried, checked = self.seen[node]
        self.checked |= checked
        return carried

    def of_member(self, owner, name):
        "The methods of that name which the classes in `owner` have."
        known = public()
        found = set()
        for label in owner & known.bases.keys():
            for base in known.bases[label]:
                if (method := f"{base}.{name}") in known.gives:
                    found |= {method, f"{label}.{name}"} | known.gives[method]
                    break
        return found

    def of_call(self, node):
        given = set().union(*(self.of(o) for o in [*node.args, *(k.value for k in node.keywords)]), set())
        found = self.of(node.func) | given
        found |= self.of_member(self.of(node.func), "forward") if isinstance(node.func, ast.Name) else set()
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if is_check(node) or isinstance(node.func, ast.Name) and name in self.helpers and asserts(self.helpers[name]):
            self.checked |= found
        if name.endswith("_"):
            self.change(node, found)
        return found

    def change(self, call, found):
        "Arguments and receiver may have been changed."
        for o in [call.func, *call.args, *(k.value for k in call.keywords)]:
            while isinstance(o, (ast.Attribute, ast.Subscript)):
                o = o.value
            if isinstance(o, ast.Name):
                for name in {o.id} | self.made_from.get(o.id, set()):
                    self.carries[name] = self.carries.get(name, set()) | found

    def give(self, target, value):
        for o in ast.walk(target):
            if isinstance(o, ast.Name):
                kept = set() if isinstance(target, ast.Name) else self.carries.get(o.id, set())
                self.carries[o.id] = kept | value

    # Statements

    def body(self, statements):
        for o in statements:
            self.statement(o)

    def statement(self, o):
        if isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef)):
            self.helpers[o.name] = o
        elif isinstance(o, ast.ClassDef):
            self.carries[o.name] = set().union(*(self.of(b) for b in [*o.bases, *o.decorator_list]), set())
            for f in o.body:
                if isinstance(f, ast.FunctionDef):
                    self.carries[o.name] |= Flow(self.helpers, self.carries).of_body(f)
        elif isinstance(o, ast.Assert):
            self.checked |= self.of(o.test)
        elif isinstance(o, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
            value = self.of(o.value)
            sources = {n.id for n in ast.walk(o.value) if isinstance(n, ast.Name)} if o.value else set()
            for t in o.targets if isinstance(o, ast.Assign) else [o.target]:
                self.give(t, value | (self.of(t) if isinstance(o, ast.AugAssign) else set()))
                self.made_from |= {n.id: sources for n in ast.walk(t) if isinstance(n, ast.Name)}
        elif isinstance(o, ast.Expr):
            found = self.of(o.value)
            if isinstance(o.value, ast.Call):
                self.change(o.value, found)
        elif isinstance(o, ast.For):
            self.give(o.target, self.of(o.iter))
            self.body([*o.body, *o.orelse])
        elif isinstance(o, (ast.With, ast.AsyncWith)):
            values, checks = set(), False
            for item in o.items:
                value = self.of(item.context_expr)
                values |= value
                checks |= is_check(item.context_expr)
                if item.optional_vars:
                    self.give(item.optional_vars, value)
            self.body(o.body)
            if checks:
                self.checked |= set().union(*map(self.of, calls(o.body)), set())
            for name in ast.walk(o):  # what is made within a context depends on it
                if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                    self.carries[name.id] = self.carries.get(name.id, set()) | values
        elif isinstance(o, (ast.If, ast.While)):
            self.of(o.test)
            self.body([*o.body, *o.orelse])
        elif isinstance(o, ast.Try):
            self.body([*o.body, *(s for h in o.handlers for s in h.body), *o.orelse, *o.finalbody])
        elif isinstance(o, ast.Return):
            self.of(o.value)

    def of_body(self, function):
        self.body(function.body)
        return set().union(*map(self.of, calls(function.body)), set())


def checked_by_page(path) -> set:
    "Public names that a page checks."
    flow = Flow()
    for c in read_cells(path, "code"):
        if "#| eval: false" not in c["source"]:
            tree = ast.parse(magic.sub("pass", c["source"]))
            exported = re.search(r"^#\|\s*export", c["source"], re.M)
            if not exported:
                flow.body(tree.body)
    return flow.checked


def definitions(path, seen=()):
    "Functions, fixtures and names of a file of tests, and of the helpers that it imports."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for o in tree.body:
        if isinstance(o, ast.ImportFrom) and o.module and o.module.split(".")[0] in ("cases", "tiny"):
            other = root / "tests" / (o.module.replace(".", "/") + ".py")
            if other not in seen:
                found += definitions(other, (*seen, path))
    return found + tree.body


def checked_by_file(path) -> set:
    "Public names that a file of tests checks."
    everything = definitions(path)
    start = Flow()
    start.body(o for o in everything if not (isinstance(o, ast.FunctionDef) and o.name.startswith("test_")))
    checked = set(start.checked)
    for o in everything:
        if isinstance(o, ast.FunctionDef) and o.name.startswith("test_"):
            flow = Flow(start.helpers, start.carries)
            for d in o.decorator_list:  # parameters come from here
                for a in o.args.args:
                    flow.carries[a.arg] = flow.carries.get(a.arg, set()) | flow.of(d)
            for a in o.args.args:
                if a.arg in start.helpers:
                    flow.carries[a.arg] = flow.carries.get(a.arg, set()) | start.inside_of(a.arg)
            for name in {a.arg for a in o.args.args} & flow.helpers.keys():
                del flow.helpers[name]
            flow.body(o.body)
            checked |= flow.checked
    return checked


@cache
def uses(label, name) -> set:  # 'Class.method'
    "Methods that a method of a class calls on itself."
    method = getattr(public().classes[label], name, None)
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(method))))
    except (TypeError, OSError, SyntaxError):
        return set()
    own = [o for o in ast.walk(tree) if isinstance(o, ast.Attribute) and isinstance(o.value, ast.Name)]
    return {f"{label}.{o.attr}" for o in own if o.value.id in ("self", "cls", "loop")}


def with_hooks(names) -> set:
    "What is checked, with the methods of the same object that are called on the way."
    known = public()
    todo = {o for o in names if "." in o} | {
        f"{o}.{k}" for o in names & known.classes.keys() for k in ("__init__", "__post_init__")
    }
    seen = set()
    while todo - seen:
        one = (todo - seen).pop()
        seen.add(one)
        label, name = one.split(".")
        if label in known.classes:
            todo |= uses(label, name)
            seen |= (
                {f"{base}.{name}" for base in known.bases[label] if name in vars(known.classes[base])}
                if name[0] != "_"
                else set()
            )
    return names | seen


@cache
def checked() -> dict:  # Public name -> pages and files that check it
    "Who checks what."
    found = {}
    tests = sorted(p for p in (root / "tests").rglob("test_*.py"))
    for path, names in [
        *((p, checked_by_page(p)) for p in [*lessons(), *inside()]),
        *((p, checked_by_file(p)) for p in tests),
    ]:
        for name in with_hooks(names) & public().things.keys():
            found.setdefault(name, []).append(path)
    return found
