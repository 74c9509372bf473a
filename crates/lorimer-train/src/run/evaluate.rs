//! Loss, exact matches and choice accuracy of a model on encoded rows, from one forward a row.

use candle_core::{DType, Tensor};
use lorimer_model::{Adaptation, BaseModel, Inference, TextModel};
use lorimer_tensor::cross_entropy;
use serde::Serialize;

use crate::data::encode::Example;
use crate::error::Result;

/// Token rows that go through the model at a time.
const ROWS: usize = 1024;
/// Most choices that are found by themselves.
const MAX_CHOICES: usize = 16;

/// Figures of one evaluation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// Rows evaluated.
    pub examples: usize,
    /// Supervised tokens in them.
    pub supervised_tokens: usize,
    /// Sum of −log p over supervised tokens, divided by their number.
    pub loss: f64,
    /// e to the loss.
    pub perplexity: f64,
    /// Share of rows whose last answer greedy decoding would give exactly, end of turn included.
    pub exact_match: f64,
    /// Share of rows whose own answer is the likeliest of the choices; None without choices.
    pub choice_accuracy: Option<f64>,
    /// The choices.
    pub choices: Vec<String>,
}

/// The distinct answers of the rows, if they are at most 16 and each stands for several rows.
pub fn find_choices(examples: &[Example]) -> Vec<String> {
    let answers: Option<Vec<&String>> = examples.iter().map(|e| e.answer.as_ref()).collect();
    let mut choices: Vec<String> = answers.unwrap_or_default().into_iter().cloned().collect();
    choices.sort();
    choices.dedup();
    let clear = (2..=MAX_CHOICES).contains(&choices.len()) && choices.len() * 4 <= examples.len();
    if clear { choices } else { Vec::new() }
}

/// One sequence through the model, with what is asked of it.
struct Item<'a> {
    tokens: Vec<u32>,
    example: &'a Example,
    /// Rows of the sequence whose log p of a target is wanted: (row, target).
    wanted: Vec<(usize, u32)>,
}

/// Log p of every wanted target, and whether it is the likeliest token, item by item.
fn score(
    model: &dyn BaseModel,
    adaptation: &(dyn Adaptation + Sync),
    items: &[Item<'_>],
) -> Result<Vec<Vec<(f64, bool)>>> {
    let mut scores = Vec::with_capacity(items.len());
    let mut from = 0;
    while from < items.len() {
        let (mut to, mut rows) = (from, 0);
        while to < items.len() && (to == from || rows + items[to].tokens.len() <= ROWS) {
            rows += items[to].tokens.len();
            to += 1;
        }
        let chunk = &items[from..to];
        let batch = model.shape().batch(chunk.iter().map(|i| i.tokens.as_slice()));
        let hidden = rayon::scope(|_| model.hidden(&batch, &Inference::of(adaptation)))?;
        let wanted: Vec<(u32, u32)> = chunk
            .iter()
            .zip(&batch.rows)
            .flat_map(|(item, rows)| item.wanted.iter().map(|&(row, target)| (rows[row], target)))
            .collect();
        let mut flat = Vec::with_capacity(wanted.len());
        for part in wanted.chunks(256) {
            let (rows, targets): (Vec<u32>, Vec<u32>) = part.iter().copied().unzip();
            let index = Tensor::from_vec(rows, part.len(), hidden.device())?;
            let logits = rayon::scope(|_| model.logits(&hidden.index_select(&index, 0)?, &Inference::of(adaptation)))?;
            let losses = cross_entropy(&logits, &targets)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
            let best = logits.argmax(1)?.to_vec1::<u32>()?;
            flat.extend(losses.iter().zip(best).zip(&targets).map(|((l, b), t)| (-l, b == *t)));
        }
        let mut flat = flat.into_iter();
        scores.extend(chunk.iter().map(|item| flat.by_ref().take(item.wanted.len()).collect::<Vec<_>>()));
        from = to;
    }
    Ok(scores)
}

/// Evaluates rows. `choices` are label words whose likelihoods are compared; each counts by the log p of its own tokens.
/// `progress` hears the number of rows done.
pub fn evaluate(
    model: &dyn BaseModel,
    text: &TextModel,
    adaptation: &(dyn Adaptation + Sync),
    examples: &[Example],
    choices: &[String],
    mut progress: impl FnMut(usize),
) -> Result<Evaluation> {
    let choice_ids = choices.iter().map(|c| Ok(text.encode(c, false)?.ids)).collect::<Result<Vec<Vec<u32>>>>()?;
    let single = choice_ids.iter().all(|ids| ids.len() == 1);
    let (mut loss, mut tokens, mut exact, mut chosen, mut with_choice) = (0.0, 0, 0, 0, 0);
    for (start, chunk) in examples.chunks(16).enumerate() {
        let mut items = Vec::new();
        for example in chunk {
            model.check_length(example.tokens.len()).map_err(lorimer_model::Error::from)?;
            let mut wanted: Vec<_> = example.targets().map(|i| (i - 1, example.tokens[i])).collect();
            let answer = example.last_answer(&text.eos_ids);
            let prefix = example.tokens[..answer.start].to_vec();
            if single && answer.start > 0 {
                wanted.extend(choice_ids.iter().map(|ids| (answer.start - 1, ids[0])));
            }
            items.push(Item { tokens: example.tokens.clone(), example, wanted });
            if !single && answer.start > 0 {
                for ids in choice_ids.iter().filter(|ids| !ids.is_empty()) {
                    let tokens = [&prefix[..], &ids[..ids.len() - 1]].concat();
                    let wanted = ids.iter().enumerate().map(|(j, &id)| (answer.start - 1 + j, id)).collect();
                    items.push(Item { tokens, example, wanted });
                }
            }
        }
        let scores = score(model, adaptation, &items)?;
        let mut at = 0;
        while at < items.len() {
            let example = items[at].example;
            let own = &scores[at];
            let answer = example.last_answer(&text.eos_ids);
            let targets: Vec<usize> = example.targets().collect();
            loss -= own[..targets.len()].iter().map(|s| s.0).sum::<f64>();
            tokens += targets.len();
            exact += usize::from(targets.iter().zip(own).all(|(i, s)| !answer.contains(i) || s.1));
            at += 1;
            let mut likelihoods: Vec<f64> = own[targets.len()..].iter().map(|s| s.0).collect();
            while at < items.len() && std::ptr::eq(items[at].example, example) {
                likelihoods.push(scores[at].iter().map(|s| s.0).sum());
                at += 1;
            }
            if likelihoods.len() == choices.len() && !choices.is_empty() {
                let best = (0..choices.len()).max_by(|&a, &b| likelihoods[a].total_cmp(&likelihoods[b]));
                with_choice += 1;
                chosen += usize::from(best.is_some_and(|b| example.answer.as_ref() == Some(&choices[b])));
            }
        }
        progress(start * 16 + chunk.len());
    }
    let loss = loss / tokens.max(1) as f64;
    Ok(Evaluation {
        examples: examples.len(),
        supervised_tokens: tokens,
        loss,
        perplexity: loss.exp(),
        exact_match: exact as f64 / examples.len().max(1) as f64,
        choice_accuracy: (with_choice > 0).then(|| chosen as f64 / with_choice as f64),
        choices: choices.to_vec(),
    })
}

/// log p of every token of a sequence from `first` on, given those before it.
pub fn log_probabilities(
    model: &dyn BaseModel,
    adaptation: &(dyn Adaptation + Sync),
    tokens: &[u32],
    first: usize,
) -> Result<Vec<f32>> {
    let wanted = (first.max(1)..tokens.len()).map(|i| (i - 1, tokens[i])).collect();
    let example = Example { tokens: Vec::new(), supervised: Vec::new(), answer: None };
    let item = Item { tokens: tokens.to_vec(), example: &example, wanted };
    Ok(score(model, adaptation, &[item])?.into_iter().flatten().map(|s| s.0 as f32).collect())
}
