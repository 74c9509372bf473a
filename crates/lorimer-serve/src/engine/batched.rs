//! Many adapters in one forward: the seam's implementation for serving.

use std::ops::Range;
use std::sync::{PoisonError, RwLock};

use candle_core::{Result, Tensor};
use lorimer_model::{Adaptation, AttentionCall, BaseModel, BlockScope, Point, Projection, Site, run_blocks};
use lorimer_tensor::{
    Addition, Group, KeyPool, Ops, Paged, Segment, Segmented, Tape, attention_in_pool, project_segmented, store_rows,
};

use crate::adapters::hosted::Hosted;
use crate::engine::pool::{BLOCK, Geometry};

/// Distance between the first keys of two sequences in the segments that the model hands on; longer than any sequence.
const APART: usize = 1 << 32;

/// An adapter in the pool, with the weight that a request gives it.
#[derive(Clone, Copy)]
pub struct Used<'a> {
    /// What it holds.
    pub hosted: &'a Hosted,
    /// Where.
    pub pages: &'a [u32],
    /// What its change is multiplied by.
    pub weight: f32,
}

/// One sequence's rows in a batch.
pub struct Rows<'a> {
    /// How many there are.
    pub count: usize,
    /// Position of the first.
    pub position: usize,
    /// Pages of its blocks of tokens, a page a layer; as many as the last row's position needs.
    pub blocks: &'a [Vec<u32>],
    /// Its adapters.
    pub adapters: Vec<Used<'a>>,
}

/// The rows of some sequences, computed together. Keys and values go into the pool, and are read from there.
pub struct Batched<'a> {
    pool: RwLock<&'a mut [f32]>,
    geometry: Geometry,
    sequences: Vec<Rows<'a>>,
    /// Rows of each sequence.
    ranges: Vec<Range<usize>>,
    /// The same, of the rows that the last layer gives.
    needed_ranges: Vec<Range<usize>>,
    /// Nothing is recorded on it: with a tape operations run in our own kernels and build no graph.
    tape: Tape,
}

impl<'a> Batched<'a> {
    /// A batch over the pool's numbers; `needed` are the rows (ascending) that the last layer is to give.
    pub fn new(pool: &'a mut [f32], geometry: Geometry, sequences: Vec<Rows<'a>>, needed: &[u32]) -> Self {
        let (mut ranges, mut needed_ranges, mut row, mut at) = (Vec::new(), Vec::new(), 0, 0);
        for s in &sequences {
            let end = row + s.count;
            let inside = needed[at..].iter().take_while(|&&n| (n as usize) < end).count();
            ranges.push(row..end);
            needed_ranges.push(at..at + inside);
            (row, at) = (end, at + inside);
        }
        Self { pool: RwLock::new(pool), geometry, sequences, ranges, needed_ranges, tape: Tape::new([]) }
    }

    /// Positions of all rows.
    pub fn positions(&self) -> Vec<usize> {
        self.sequences.iter().flat_map(|s| s.position..s.position + s.count).collect()
    }

    /// Segments for the model's layout, each sequence's keys counted from a place of its own.
    pub fn segments(&self) -> Vec<Segment> {
        let of = |(i, s): (usize, &Rows<'_>)| Segment {
            q_start: self.ranges[i].start,
            q_len: s.count,
            keys: vec![(i * APART, s.position + s.count)],
        };
        self.sequences.iter().enumerate().map(of).collect()
    }

    /// The logits of the rows `needed`, which are those that [`Self::new`] was given, of the batch's `tokens`; None where no row is needed.
    pub fn logits(&self, model: &dyn BaseModel, tokens: &[u32], needed: &[u32]) -> Result<Option<Tensor>> {
        let h = model.embed(tokens, &self.positions(), self)?;
        let some = (needed.len() < tokens.len()).then_some(needed);
        let layout = model.layout(&self.positions(), &self.segments(), some);
        // Only keys and values of the last layer are wanted where no token is drawn.
        let h = run_blocks(model, h, 0..model.shape().layers.len(), &layout, self, None, |_, _| {})?;
        if needed.is_empty() {
            return Ok(None);
        }
        model.logits(&model.end(&h, self)?, self).map(Some)
    }

    /// Row of the pool of a token's key in a layer.
    fn place(&self, sequence: usize, position: usize, layer: usize) -> Option<usize> {
        let page = *self.sequences[sequence].blocks.get(position / BLOCK)?.get(layer)?;
        Some(page as usize * 2 * BLOCK + position % BLOCK)
    }

    /// Spans of the pool's rows for keys of a segment.
    fn spans(&self, keys: &[(usize, usize)], layer: usize) -> Result<Vec<(usize, usize)>> {
        let mut spans: Vec<(usize, usize)> = Vec::new();
        for &(start, n) in keys {
            let (sequence, mut position) = (start / APART, start % APART);
            let end = position + n;
            while position < end {
                let n = (BLOCK - position % BLOCK).min(end - position);
                let Some(row) = self.place(sequence, position, layer) else {
                    candle_core::bail!("a sequence has no page for position {position}")
                };
                spans.push((row, n));
                position += n;
            }
        }
        Ok(spans)
    }

    /// The rows of x by adapter: the ranges that fit their number.
    fn ranges(&self, rows: usize) -> Result<&[Range<usize>]> {
        let count = |ranges: &[Range<usize>]| ranges.last().map_or(0, |r| r.end);
        match rows {
            n if n == count(&self.ranges) => Ok(&self.ranges),
            n if n == count(&self.needed_ranges) => Ok(&self.needed_ranges),
            n => candle_core::bail!("{n} rows belong to no part of the batch"),
        }
    }

    /// What the adapters do to a projection, sequences with the same adapters next to each other taken together.
    fn groups<'b>(&'b self, pool: &'b [f32], site: &Site, rows: usize) -> Result<Vec<Group<'b>>> {
        let mut groups: Vec<Group<'b>> = Vec::new();
        let mut before: Option<&[Used<'a>]> = None;
        for (range, s) in self.ranges(rows)?.iter().zip(&self.sequences) {
            let same = before.is_some_and(|b| {
                let pairs = b.iter().zip(&s.adapters);
                b.len() == s.adapters.len()
                    && pairs.into_iter().all(|(a, b)| std::ptr::eq(a.pages, b.pages) && a.weight == b.weight)
            });
            if let Some(group) = groups.last_mut().filter(|g| same && g.rows.end == range.start) {
                group.rows.end = range.end;
                continue;
            }
            before = Some(&s.adapters);
            let additions = s.adapters.iter().filter_map(|used| {
                let place = used.hosted.places.get(&site.path)?;
                let paged = |start, count, length| Paged {
                    pool,
                    page: self.geometry.page(),
                    pages: used.pages,
                    start,
                    count,
                    length,
                };
                Some(Addition {
                    a: paged(place.a, place.rank, site.inputs),
                    b: paged(place.b, place.rank, site.outputs),
                    output_scale: place.output_scale.map(|at| paged(at, 1, site.outputs)),
                    bias: place.bias.map(|at| paged(at, 1, site.outputs)),
                    gate: place.gate.and_then(|i| Some(used.hosted.gates.get(i)?.as_ref())),
                    weight: used.weight,
                })
            });
            groups.push(Group { rows: range.clone(), additions: additions.collect() });
        }
        Ok(groups)
    }
}

impl Adaptation for Batched<'_> {
    fn ops(&self) -> Ops<'_> {
        Ops::recorded(&self.tape)
    }

    fn project(&self, site: &Site, base: &Projection, x: &Tensor) -> Result<Tensor> {
        let mut all = self.project_all(&[(site, base)], x)?;
        all.pop().ok_or_else(|| candle_core::Error::Msg("no projection".into()))
    }

    fn project_all(&self, targets: &[(&Site, &Projection)], x: &Tensor) -> Result<Vec<Tensor>> {
        let rows = x.dim(0)?;
        let pool = self.pool.read().unwrap_or_else(PoisonError::into_inner);
        let parts = targets.iter().map(|(site, base)| {
            Ok(Segmented { weight: &base.weight, bias: base.bias.as_ref(), groups: self.groups(&pool, site, rows)? })
        });
        project_segmented(x, &parts.collect::<Result<Vec<_>>>()?)
    }

    fn attend(&self, point: Point, call: AttentionCall<'_>, _: &mut BlockScope<'_>) -> Result<Tensor> {
        let Point::Layer(layer) = point else { candle_core::bail!("attention outside of a layer") };
        let mut places = Vec::with_capacity(call.k.dim(0)?);
        for (i, s) in self.sequences.iter().enumerate() {
            for position in s.position..s.position + s.count {
                let Some(row) = self.place(i, position, layer) else {
                    candle_core::bail!("a sequence has no page for position {position}")
                };
                places.push(row);
            }
        }
        let mut pool = self.pool.write().unwrap_or_else(PoisonError::into_inner);
        let stride = self.geometry.kv_width;
        store_rows((&mut pool, stride), &call.k, places.iter().copied())?;
        store_rows((&mut pool, stride), &call.v, places.iter().map(|row| row + BLOCK))?;
        let segments = call
            .segments
            .iter()
            .map(|s| Ok(Segment { q_start: s.q_start, q_len: s.q_len, keys: self.spans(&s.keys, layer)? }));
        let segments = segments.collect::<Result<Vec<_>>>()?;
        let keys = KeyPool { numbers: &pool, stride, width: call.k.dim(1)?, values_at: BLOCK };
        attention_in_pool(&call.q, keys, &segments, &call.form)
    }
}
