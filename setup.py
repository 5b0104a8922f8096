from configparser import ConfigParser
from setuptools import setup

settings = ConfigParser()
settings.read('settings.ini', encoding='utf-8')


def requirements(key): return [o for o in settings['DEFAULT'][key].splitlines() if o.strip()]


setup(install_requires=requirements('requirements'),
      extras_require={o: requirements(f'{o}_requirements') for o in ('dev', 'browser')})
