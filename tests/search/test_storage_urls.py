"""A storage URL that cannot be opened says what to do, in one line and without its password."""

import builtins

import pytest

from heretic_kl.errors import StudyError
from heretic_kl.search import open_storage


@pytest.mark.parametrize(
    ("url", "module", "expected"),
    [
        ("mysql://u:pw@h/db", "MySQLdb", "its driver is not installed: pip install 'mysqlclient'"),
        ("mysql+pymysql://u:pw@h/db", "pymysql", "pip install 'PyMySQL'"),
        ("postgresql+psycopg2://u:pw@h/db", "psycopg2", "pip install 'psycopg2-binary'"),
        ("foo://u:pw@h/db", "", "unknown scheme 'foo'; write sqlite:///FILE"),
        ("studies.db", "", "not a URL; write sqlite:///FILE"),
        ("sqlite:////no/such/folder/x.db", "", "unable to open database file"),
    ],
)
def test_one_line(url, module, expected, monkeypatch, tmp_path):
    real = builtins.__import__

    def absent(name, globals=None, locals=None, fromlist=(), level=0):
        if module and level == 0 and name.partition(".")[0] == module:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(StudyError) as caught, open_storage(url, tmp_path, "s"):
        pass
    message = str(caught.value)
    assert expected in message and "\n" not in message
    assert "pw" not in message and "install appropriate" not in message
