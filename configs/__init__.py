"""One experiment per file: the settings that differ from bn_keras/training/config.py.

Installed as bn_keras_configs. Configs in other folders import them by that name:
`from bn_keras_configs import bn_x5`.
"""
