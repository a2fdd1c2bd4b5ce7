from engine import Task, Trainer
from tests.benchmarks.beside.common import TEXTS, Reader, padded


class Next(Task):
    def configure_model(self):
        return Reader()

    def configure_optimizer(self, model):
        raise NotImplementedError

    def train_data(self):
        raise NotImplementedError

    def loss(self, model, text):
        raise NotImplementedError

    def collate_validation(self, texts):
        return padded(texts)

    def predict(self, model, text):
        return model(text)[:, :, 0].argmax(1)


result = Trainer(micro_batch_size=4, max_epochs=1).predict(Next(), TEXTS)
