"""One sweep from its configuration to its last trial: state, policy, searcher, runner and the folder that holds it;
knows launchers only as a protocol.
"""
