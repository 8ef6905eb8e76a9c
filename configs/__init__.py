"""One experiment a file: what differs from the schema in bn_keras/training/config.py.

Installed as bn_keras_configs, which is also the name to import them by in a config of your own:
`from bn_keras_configs import bn_x5`.
"""
