"""One experiment per file: the settings that differ from the schema bn_keras/training/config.py.

Installed as bn_keras_configs; configs outside of this folder import them by that name:
`from bn_keras_configs import bn_x5`.
"""
