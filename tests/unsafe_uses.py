"""What a source uses that can run code out of what it reads, by full name, whatever it is called there."""

import ast
import re
from collections.abc import Iterator
from fnmatch import translate

MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "runpy"}
"""None of them, nor what lies in them, also within another package."""
FUNCTIONS = (
    *("eval", "exec", "compile", "__import__"),
    *("os.system", "os.popen", "os.exec*", "os.spawn*", "os.posix_spawn*", "posix.*", "pty.spawn"),
    *("subprocess.getoutput", "subprocess.getstatusoutput"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_*", "yaml.full_*"),
    *("torch.load", "torch.jit.load", "torch.hub.load", "torch.package.*"),
    *("mlflow.*load_model", "pandas.read_pickle", "shutil.unpack_archive", "*.extractall"),
)
"""Called, passed on or given another name: but for calls that is_safe() knows."""
_FUNCTIONS = re.compile("|".join(map(translate, FUNCTIONS)))
ARGUMENTS = ("shell", "allow_pickle")
"""None of them but False, nor as the key of a dict."""


def findings(tree: ast.AST) -> set[str]:
    """Return what a source uses of the above."""
    names = _Names(tree)
    nodes = list(ast.walk(tree))
    safe = {id(node.func) for node in nodes if isinstance(node, ast.Call) and is_safe(node, names)}
    used = {names.of(node) for node in nodes if id(node) not in safe and not _is_assigned(node)}
    found = {name for name in used if _is_function(name)} | {part for name in used for part in _modules(name)}
    found |= {part for name in names.imported for part in _modules(name)}
    found |= {name for name in names.imported if name.endswith("*")}
    return found | {f"{name}={value}" for node in nodes for name, value in _arguments(node)}


def is_safe(call: ast.Call, names: "_Names") -> bool:
    """Return whether the call reads tensors alone, or YAML without Python's objects."""
    values = {word.arg: word.value for word in call.keywords}
    if names.of(call.func) == "torch.load":
        return "weights_only" in values and ast.unparse(values["weights_only"]) == "True"
    loader = values.get("Loader", call.args[1] if len(call.args) > 1 else None)
    return names.of(call.func) in ("yaml.load", "yaml.load_all") and names.of(loader) == "yaml.SafeLoader"


class _Names:
    """The full names of what a source imports, wherever it does; of two things with one name there, the last counts."""

    def __init__(self, tree: ast.AST) -> None:
        self.imported: set[str] = set()
        self._full: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                self._add({alias.asname or alias.name.partition(".")[0]: alias.name for alias in node.names})
                self._full |= {
                    root: root for alias in node.names if not alias.asname for root in alias.name.split(".")[:1]
                }
            elif isinstance(node, ast.ImportFrom):
                self._add({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})

    def _add(self, full: dict[str, str]) -> None:
        self.imported |= set(full.values())
        self._full |= full

    def of(self, node: ast.AST | None) -> str:
        """Return the full name of a name or an attribute; its part that has none is empty."""
        if isinstance(node, ast.Name):
            return self._full.get(node.id, node.id).removeprefix("builtins.")
        if isinstance(node, ast.Attribute):
            return f"{self.of(node.value)}.{node.attr}".removeprefix("builtins.")
        if isinstance(node, ast.Call) and len(texts := _texts(node)) == 1:
            if self.of(node.func) in ("importlib.import_module", "__import__"):
                return texts[0]
            if self.of(node.func) == "getattr":
                return f"{self.of(node.args[0])}.{texts[0]}".removeprefix("builtins.")
        return ""


def _texts(call: ast.Call) -> list[str]:
    return [word.value for word in call.args if isinstance(word, ast.Constant) and isinstance(word.value, str)]


def _is_assigned(node: ast.AST) -> bool:
    return isinstance(getattr(node, "ctx", None), ast.Store)


def _is_function(name: str) -> bool:
    return _FUNCTIONS.match(name) is not None


def _modules(name: str) -> set[str]:
    return MODULES & set(name.split("."))


def _arguments(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield those of ARGUMENTS, in a call or as keys of a dict, that are not plainly False."""
    pairs: list[tuple[object, ast.expr]] = []
    if isinstance(node, ast.Call):
        pairs = [(word.arg, word.value) for word in node.keywords]
    elif isinstance(node, ast.Dict):
        keys = zip(node.keys, node.values, strict=True)
        pairs = [(key.value, value) for key, value in keys if isinstance(key, ast.Constant)]
    for name, value in pairs:
        if name in ARGUMENTS and (text := ast.unparse(value)) != "False":
            yield str(name), text
