"""Model, data, training, evaluation and runtime of a Vision-Language-Action policy. Never imports ROS."""
