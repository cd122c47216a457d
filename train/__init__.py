"""Cache to student: streams a teacher cache and trains a model on it, without the teacher."""
