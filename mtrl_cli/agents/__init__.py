"""Learning algorithms: DQN and PQN."""
