"Errors and private helpers of ftbook.models.shipped."

from ftbook.models.shipped import _pip_error


def test_str_1():
    def why(said):
        return str(_pip_error('tiny', '1.0', '0' * 64, said))

    assert 'm ensurepip' in why('/usr/bin/python: No module named pip')
    assert f'expected sha256 {"0" * 64}, got {"a" * 64}' in why(f'ERROR: HASHES\n   Got        {"a" * 64}')
    assert 'try again with a network' in why('WARNING: Retrying\nERROR: No matching distribution found for tiny==1.0')
