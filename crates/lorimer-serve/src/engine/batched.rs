//! Many adapters in one forward: the seam's implementation for serving.

use std::ops::Range;
use std::sync::{Mutex, PoisonError, RwLock};

use candle_core::{DType, Result, Tensor};
use lorimer_model::{
    Adaptation, AttentionCall, BaseModel, BlockScope, Point, Projection, Site, run_blocks, whole_pass,
};
use lorimer_tensor::{
    Addition, AttentionForm, Edges, Group, KeyDtype, KeyPool, Ops, Paged, RankGate, Segment, Segmented, Tape,
    attention_in_pool, edges_in_pool, project_segmented, store_rows, store_rows_in_8_bits,
};

use crate::adapters::hosted::{Hosted, HostedLayer, HostedRouter, Spread};
use crate::engine::kept::{Kept, Place, apply, over_kept_rows};
use crate::engine::pool::{BLOCK, Geometry};
use crate::engine::routes::{Routes, RowGates, Run};

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
    /// Pages of its blocks of tokens: a page a layer of each pass, the last pass first, and what its adapters keep; as many as the last row's
    /// position needs.
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
    /// What the attention of the block that is computed showed to each run of sequences with a layer after it.
    seen: Mutex<Vec<Option<Edges>>>,
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
        let seen = Mutex::default();
        Self { pool: RwLock::new(pool), geometry, sequences, ranges, needed_ranges, seen, tape: Tape::new([]) }
    }

    /// The logits of the rows `needed`, which are those that [`Self::new`] was given, of the batch's `tokens`; None where no row is needed.
    pub fn logits(&self, model: &dyn BaseModel, tokens: &[u32], needed: &[u32]) -> Result<Option<Tensor>> {
        let pass = self.last_pass(model, tokens, needed)?;
        let h = model.embed(tokens, &pass.positions(), &pass)?;
        // A layer after the attention has to have all rows.
        let mut used = self.sequences.iter().flat_map(|s| &s.adapters);
        let whole = used.any(|used| used.hosted.layers.iter().any(|layer| layer.delta.unit_router().is_none()));
        let some = (needed.len() < tokens.len() && !whole).then_some(needed);
        let layout = model.layout(&pass.positions(), &pass.segments(), some);
        // Only keys and values of the last layer are wanted where no token is drawn.
        let h = run_blocks(model, h, 0..model.shape().layers.len(), &layout, &pass, None, |_, _| {})?;
        if needed.is_empty() {
            return Ok(None);
        }
        let h = if whole { pass.ops().rows(&h, needed)? } else { h };
        model.logits(&model.end(&h, &pass)?, &pass).map(Some)
    }

    /// Runs of sequences next to each other whose adapters are the same: the places of each run among `which`.
    fn runs(&self, which: &[usize]) -> Vec<Range<usize>> {
        let same = |a: &usize, b: &usize| {
            if *b != a + 1 {
                return false;
            }
            let (a, b) = (&self.sequences[*a].adapters, &self.sequences[*b].adapters);
            let pair = |(a, b): (&Used<'a>, &Used<'a>)| std::ptr::eq(a.pages, b.pages) && a.weight == b.weight;
            a.len() == b.len() && a.iter().zip(b).all(pair)
        };
        let mut at = 0;
        let run = |run: &[usize]| {
            at += run.len();
            at - run.len()..at
        };
        which.chunk_by(same).map(run).collect()
    }

    /// The last pass over all rows; after a first one over those of adapters with routers.
    fn last_pass(&self, model: &dyn BaseModel, tokens: &[u32], needed: &[u32]) -> Result<Pass<'_, 'a>> {
        let all: Vec<usize> = (0..self.sequences.len()).collect();
        let mut last = Pass {
            batch: self,
            runs: self.runs(&all).into_iter().map(Run::plain).collect(),
            which: all,
            ranges: self.ranges.clone(),
            needed_ranges: self.needed_ranges.clone(),
            layers_before: 0,
        };
        let which: Vec<usize> = (0..self.sequences.len()).filter(|&i| self.router(i).is_some()).collect();
        if which.is_empty() {
            return Ok(last);
        }
        let own: Vec<u32> = which.iter().flat_map(|&i| &tokens[self.ranges[i].clone()]).copied().collect();
        let mut ranges: Vec<Range<usize>> = Vec::new();
        for &i in &which {
            let start = ranges.last().map_or(0, |before| before.end);
            ranges.push(start..start + self.sequences[i].count);
        }
        let mut runs: Vec<Run> = self.runs(&which).into_iter().map(Run::plain).collect();
        for run in &mut runs {
            let first = self.router(which[run.places.start]).map(|hosted| hosted.router.first_pass()).transpose()?;
            run.routes = first.flatten().map(|numbers| Routes::of(&numbers, true, Vec::new())).transpose()?;
            run.bare = run.routes.is_none();
        }
        let layers_before = self.geometry.layers;
        let first = Pass { batch: self, which, needed_ranges: ranges.clone(), ranges, runs, layers_before };
        let positions = first.positions();
        let rows = (positions.as_slice(), &first.segments()[..]);
        let mut bottom = |on: &dyn Adaptation| Ok((0, model.embed(&own, &positions, on)?));
        let hidden = whole_pass(model, &first, rows, &mut bottom, None)?;
        for run in &first.runs {
            let sequences = &first.which[run.places.clone()];
            let (Some(&one), Some(&end)) = (sequences.first(), sequences.last()) else { continue };
            let Some(hosted) = self.router(one) else { continue };
            let rows = first.ranges[run.places.start].start..first.ranges[run.places.end - 1].end;
            let routes = hosted.router.all_routes(&hidden.narrow(0, rows.start, rows.len())?)?;
            let (start, stop) = (self.ranges[one].start as u32, self.ranges[end].end as u32);
            let own: Vec<u32> = needed.iter().filter(|&&n| start <= n && n < stop).map(|n| n - start).collect();
            if let Some(into) = last.runs.iter_mut().find(|r| r.places.start == one) {
                into.routes = Some(Routes::of(&routes, false, own)?);
            }
        }
        Ok(last)
    }

    /// The router of a sequence's adapter, which is the only one where it has one.
    fn router(&self, sequence: usize) -> Option<&'a HostedRouter> {
        self.sequences[sequence].adapters.iter().find_map(|used| used.hosted.router.as_ref())
    }
}

/// Routes of a unit's rows, a run each, where its adapter has a router there.
type UnitRoutes = Vec<Option<Routes>>;

/// A unit of a block, whose rows have their routes.
struct UnitPass<'p, 'b, 'a> {
    pass: &'p Pass<'b, 'a>,
    routes: UnitRoutes,
}

impl Adaptation for UnitPass<'_, '_, '_> {
    fn ops(&self) -> Ops<'_> {
        self.pass.ops()
    }

    fn project(&self, site: &Site, base: &Projection, x: &Tensor) -> Result<Tensor> {
        let mut all = self.project_all(&[(site, base)], x)?;
        all.pop().ok_or_else(|| candle_core::Error::Msg("no projection".into()))
    }

    fn project_all(&self, targets: &[(&Site, &Projection)], x: &Tensor) -> Result<Vec<Tensor>> {
        self.pass.project_routed(targets, x, Some(&self.routes))
    }
}

/// One pass over the rows of some of the batch's sequences.
struct Pass<'b, 'a> {
    batch: &'b Batched<'a>,
    /// The sequences.
    which: Vec<usize>,
    /// Rows of each of them, and those that the last layer gives.
    ranges: Vec<Range<usize>>,
    needed_ranges: Vec<Range<usize>>,
    runs: Vec<Run>,
    /// Where its pages begin in those of a block.
    layers_before: usize,
}

impl<'a> Pass<'_, 'a> {
    fn sequences(&self) -> impl Iterator<Item = &Rows<'a>> {
        self.which.iter().map(|&i| &self.batch.sequences[i])
    }

    /// Positions of all rows.
    fn positions(&self) -> Vec<usize> {
        self.sequences().flat_map(|s| s.position..s.position + s.count).collect()
    }

    /// Segments for the model's layout, each sequence's keys counted from a place of its own.
    fn segments(&self) -> Vec<Segment> {
        let of = |(i, s): (usize, &Rows<'_>)| Segment {
            q_start: self.ranges[i].start,
            q_len: s.count,
            keys: vec![(i * APART, s.position + s.count)],
        };
        self.sequences().enumerate().map(of).collect()
    }

    /// Row of the pool of a token's key in a layer.
    fn place(&self, sequence: usize, position: usize, layer: usize) -> Option<usize> {
        let blocks = self.batch.sequences[*self.which.get(sequence)?].blocks;
        let page = *blocks.get(position / BLOCK)?.get(self.layers_before + layer)?;
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

    /// Sequences next to each other with the same adapter that has a layer after a block's attention, with the layer and the first of its pages in
    /// a block of tokens.
    fn layers_after(&self, layer: usize) -> Vec<(Range<usize>, &HostedLayer, usize)> {
        let mut runs: Vec<(Range<usize>, &HostedLayer, usize)> = Vec::new();
        let geometry = self.batch.geometry;
        for (i, s) in self.sequences().enumerate() {
            let Some((own, first)) = s.adapters.iter().find_map(|used| used.hosted.layer(layer, geometry)) else {
                continue;
            };
            match runs.last_mut().filter(|(run, other, _)| run.end == i && std::ptr::eq(*other, own)) {
                Some((run, ..)) => run.end = i + 1,
                None => runs.push((i..i + 1, own, first)),
            }
        }
        runs
    }

    /// Where the rows of some sequences lie.
    fn places_of(&self, run: &Range<usize>) -> Vec<Place<'_>> {
        let of = |s: &Rows<'a>| Place { blocks: s.blocks, position: s.position, count: s.count };
        self.which[run.clone()].iter().map(|&i| of(&self.batch.sequences[i])).collect()
    }

    /// What the attention of a block shows to the layers after it: `q` (rows, …) over `keys` in `segments`, one a sequence.
    fn show(
        &self,
        layer: usize,
        q: &Tensor,
        keys: KeyPool<'_>,
        segments: &[Segment],
        form: &AttentionForm,
    ) -> Result<()> {
        let mut seen = Vec::new();
        for (run, own, _) in self.layers_after(layer) {
            let Some(rule) = own.delta.edges() else {
                seen.push(None);
                continue;
            };
            let rows = self.ranges[run.start].start..self.ranges[run.end - 1].end;
            let moved = |s: &Segment| Segment { q_start: s.q_start - rows.start, ..s.clone() };
            let (Some(own), true) = (segments.get(run.clone()), q.dim(0)? >= rows.end) else {
                candle_core::bail!("a layer after block {layer} has to see all rows")
            };
            let segments: Vec<Segment> = own.iter().map(moved).collect();
            let edges = edges_in_pool(&q.narrow(0, rows.start, rows.len())?, keys, &segments, form, rule)?;
            seen.push(Some(over_kept_rows(edges, &self.places_of(&run), layer)?));
        }
        *self.batch.seen.lock().unwrap_or_else(PoisonError::into_inner) = seen;
        Ok(())
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

    /// How a run's routes of a unit become gates of a projection's ranks, where these are experts'.
    fn experts(&self, run: &Run, site: &Site) -> Option<&'a Spread> {
        let adapters = &self.batch.sequences[self.which[run.places.start]].adapters;
        adapters.iter().filter(|_| !run.bare).find_map(|used| used.hosted.experts.get(&site.path))
    }

    /// Routes of a unit's rows by run, from what the unit reads; None where no run has a router there.
    fn unit_routes(&self, layer: usize, x: &Tensor) -> Result<Option<UnitRoutes>> {
        let ranges = self.ranges(x.dim(0)?)?;
        let of = |run: &Run| -> Result<Option<Routes>> {
            let adapters = &self.batch.sequences[self.which[run.places.start]].adapters;
            let mut layers = adapters.iter().flat_map(|used| &used.hosted.layers);
            let own = layers.find(|own| own.layer == layer).and_then(|own| own.delta.unit_router());
            let Some(router) = own.filter(|_| !run.bare) else { return Ok(None) };
            let rows = ranges[run.places.start].start..ranges[run.places.end - 1].end;
            if rows.is_empty() {
                return Ok(Some(Routes::default()));
            }
            let shares = router.shares(self.ops(), &x.narrow(0, rows.start, rows.len())?.contiguous()?)?;
            Routes::of(&router.route(self.ops(), &shares)?.factors(DType::F32)?, false, Vec::new()).map(Some)
        };
        let routes = self.runs.iter().map(of).collect::<Result<UnitRoutes>>()?;
        Ok(routes.iter().any(Option::is_some).then_some(routes))
    }

    /// Projections with what the adapters do there, within a unit whose routes are known or outside of one.
    fn project_routed(
        &self,
        targets: &[(&Site, &Projection)],
        x: &Tensor,
        unit: Option<&UnitRoutes>,
    ) -> Result<Vec<Tensor>> {
        let rows = x.dim(0)?;
        let gates = targets.iter().map(|(site, _)| self.gates(site, rows, unit)).collect::<Result<Vec<_>>>()?;
        let pool = self.batch.pool.read().unwrap_or_else(PoisonError::into_inner);
        let parts = targets.iter().zip(&gates).map(|((site, base), gates)| {
            let groups = self.groups(&pool, site, rows, gates)?;
            Ok(Segmented { weight: &base.weight, bias: base.bias.as_ref(), groups })
        });
        project_segmented(x, &parts.collect::<Result<Vec<_>>>()?)
    }

    /// Gates of each run's rows at a projection, where its adapter has a router.
    fn gates<'g>(
        &'g self,
        site: &Site,
        rows: usize,
        unit: Option<&'g UnitRoutes>,
    ) -> Result<Vec<Option<RowGates<'g>>>> {
        let ranges = self.ranges(rows)?;
        let all = rows == self.ranges.last().map_or(0, |r| r.end);
        let mut all_gates = Vec::with_capacity(self.runs.len());
        for (i, run) in self.runs.iter().enumerate() {
            if let Some(spread) = self.experts(run, site) {
                let Some(Some(routes)) = unit.map(|unit| &unit[i]) else {
                    candle_core::bail!("`{}` has experts, and its unit no route", site.path)
                };
                let rows = ranges[run.places.start].start..ranges[run.places.end - 1].end;
                all_gates.push(Some(RowGates { routes, spread, rows, needed: None }));
                continue;
            }
            let hosted = self.batch.router(self.which[run.places.start]).filter(|_| !run.bare);
            let Some(spread) = hosted.and_then(|hosted| hosted.spread(&site.path)) else {
                all_gates.push(None);
                continue;
            };
            let Some(routes) = &run.routes else { candle_core::bail!("an adapter with a router has no routes") };
            let rows = ranges[run.places.start].start..ranges[run.places.end - 1].end;
            let needed = (!all).then_some(routes.needed.as_slice());
            if needed.is_some_and(|needed| needed.len() != rows.len()) {
                candle_core::bail!("{} rows of `{}` have {} routes", rows.len(), site.path, routes.needed.len());
            }
            all_gates.push(Some(RowGates { routes, spread, rows, needed }));
        }
        Ok(all_gates)
    }

    /// What the adapters do to a projection, sequences with the same adapters next to each other taken together.
    fn groups<'g>(
        &'g self,
        pool: &'g [f32],
        site: &Site,
        rows: usize,
        gates: &'g [Option<RowGates<'g>>],
    ) -> Result<Vec<Group<'g>>> {
        let ranges = self.ranges(rows)?;
        let of = |(run, routed): (&Run, &'g Option<RowGates<'g>>)| {
            let own = ranges[run.places.start].start..ranges[run.places.end - 1].end;
            let adapters = self.batch.sequences[self.which[run.places.start]].adapters.iter();
            let additions = adapters.filter(|_| !run.bare).filter_map(|used| {
                let place = used.hosted.places.get(&site.path)?;
                let page = self.batch.geometry.page();
                let paged = |start, count, length| Paged { pool, page, pages: used.pages, start, count, length };
                let routes_here = used.hosted.router.is_some() || used.hosted.experts.contains_key(&site.path);
                let gate = match routes_here {
                    // Without rows there is nothing to gate.
                    true => Some(routed.as_ref()? as &dyn RankGate),
                    false => place.gate.and_then(|i| Some(used.hosted.gates.get(i)?.as_ref())),
                };
                Some(Addition {
                    a: paged(place.a, place.rank, site.inputs),
                    b: paged(place.b, place.rank, site.outputs),
                    output_scale: place.output_scale.map(|at| paged(at, 1, site.outputs)),
                    bias: place.bias.map(|at| paged(at, 1, site.outputs)),
                    gate,
                    weight: used.weight,
                })
            });
            Group { rows: own, additions: additions.collect() }
        };
        Ok(self.runs.iter().zip(gates).map(of).collect())
    }
}

impl Adaptation for Pass<'_, '_> {
    fn ops(&self) -> Ops<'_> {
        Ops::recorded(&self.batch.tape)
    }

    fn project(&self, site: &Site, base: &Projection, x: &Tensor) -> Result<Tensor> {
        let mut all = self.project_all(&[(site, base)], x)?;
        all.pop().ok_or_else(|| candle_core::Error::Msg("no projection".into()))
    }

    fn project_all(&self, targets: &[(&Site, &Projection)], x: &Tensor) -> Result<Vec<Tensor>> {
        self.project_routed(targets, x, None)
    }

    fn unit<'s>(&'s self, layer: usize, x: &Tensor) -> Result<Option<Box<dyn Adaptation + 's>>> {
        let routes = self.unit_routes(layer, x)?;
        Ok(routes.map(|routes| Box::new(UnitPass { pass: self, routes }) as Box<dyn Adaptation + 's>))
    }

    fn attend(&self, point: Point, call: AttentionCall<'_>, _: &mut BlockScope<'_>) -> Result<Tensor> {
        let Point::Layer(layer) = point else { candle_core::bail!("attention outside of a layer") };
        let mut places = Vec::with_capacity(call.k.dim(0)?);
        for (i, s) in self.sequences().enumerate() {
            for position in s.position..s.position + s.count {
                let Some(row) = self.place(i, position, layer) else {
                    candle_core::bail!("a sequence has no page for position {position}")
                };
                places.push(row);
            }
        }
        let mut pool = self.batch.pool.write().unwrap_or_else(PoisonError::into_inner);
        let Geometry { row: stride, dtype, .. } = self.batch.geometry;
        for (rows, at) in [(&call.k, 0), (&call.v, BLOCK)] {
            let places = places.iter().map(|row| row + at);
            match dtype {
                KeyDtype::F32 => store_rows((&mut pool, stride), rows, places)?,
                KeyDtype::Int8 => store_rows_in_8_bits((&mut pool, stride), (rows, call.form.head_dim), places)?,
            }
        }
        let segments = call
            .segments
            .iter()
            .map(|s| Ok(Segment { q_start: s.q_start, q_len: s.q_len, keys: self.spans(&s.keys, layer)? }));
        let segments = segments.collect::<Result<Vec<_>>>()?;
        let keys = KeyPool { numbers: &pool, stride, width: call.k.dim(1)?, values_at: BLOCK, dtype };
        self.show(layer, &call.q, keys, &segments, &call.form)?;
        attention_in_pool(&call.q, keys, &segments, &call.form)
    }

    fn attended(&self, h: Tensor, block: &mut BlockScope<'_>) -> Result<Tensor> {
        let layer = block.layer();
        let runs = self.layers_after(layer);
        if runs.is_empty() {
            return Ok(h);
        }
        let rows = h.dim(0)?;
        let ranges = self.ranges(rows)?;
        let mut seen = std::mem::take(&mut *self.batch.seen.lock().unwrap_or_else(PoisonError::into_inner)).into_iter();
        let (mut parts, mut at) = (Vec::new(), 0);
        for (run, own, first) in runs {
            let own_rows = ranges[run.start].start..ranges[run.end - 1].end;
            if own_rows.is_empty() {
                seen.next();
                continue;
            }
            if own_rows.start > at {
                parts.push(h.narrow(0, at, own_rows.start - at)?);
            }
            let places = self.places_of(&run);
            let mut kept = Kept { pool: &self.batch.pool, geometry: self.batch.geometry, first, places };
            let part = h.narrow(0, own_rows.start, own_rows.len())?;
            parts.push(apply(self.ops(), (layer, own.delta.as_ref()), &part, seen.next().flatten(), &mut kept)?);
            at = own_rows.end;
        }
        if at < rows {
            parts.push(h.narrow(0, at, rows - at)?);
        }
        Tensor::cat(&parts, 0)
    }
}
