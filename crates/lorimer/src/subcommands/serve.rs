//! `lorimer serve`

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, ValueEnum};
use lorimer::adapter::pruning::BaseRecord;
use lorimer::model::Base;
use lorimer::serve::adapters::store::ChatDefaults;
use lorimer::serve::engine::pool::{Geometry, shares};
use lorimer::serve::http::{self, App, Keys, Tls};
use lorimer::serve::trace::{Exporter, TraceSettings};
use lorimer::serve::{EngineSettings, Policy, Store, StoreSettings, Worker};
use lorimer::tensor::KeyDtype;

use lorimer_cli::common::ModelArgs;
use lorimer_cli::flags::{free_memory, parse_bytes};
use lorimer_cli::pooling::PoolingArgs;
use lorimer_cli::{Global, common};

/// How keys and values are kept.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub enum KvCacheDtype {
    /// As the model computes them: f32
    #[default]
    Auto,
    /// 4 bytes a number
    F32,
    /// 8 bits with a scale for each token and head: the same pool holds almost four times as many tokens, and answers differ a little
    Int8,
}

impl From<KvCacheDtype> for KeyDtype {
    fn from(flag: KvCacheDtype) -> Self {
        match flag {
            KvCacheDtype::Auto | KvCacheDtype::F32 => Self::F32,
            KvCacheDtype::Int8 => Self::Int8,
        }
    }
}

/// Serve a base and any number of its adapters over HTTP, batched together: OpenAI's calls, vLLM's for loading adapters, metrics, a web page
#[derive(Args)]
pub struct Serve {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    pooling: PoolingArgs,
    /// Folder of adapters, or the URL of an object store (s3://bucket/prefix, set up by AWS_… variables): each folder below it with an
    /// adapter_config.json is served under its path
    #[arg(long, value_name = "FOLDER|URL")]
    adapters: Option<String>,
    /// Folder that keeps what was fetched from an object store [default: below ~/.cache/lorimer]
    #[arg(long, value_name = "FOLDER")]
    adapter_cache: Option<PathBuf>,
    /// The base's name for clients [default: as --model has it]
    #[arg(long, value_name = "NAME", visible_alias = "served-model-name")]
    served_name: Option<String>,
    /// Address to listen at; other than 127.0.0.1 needs keys
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// Port; 0 takes any that is free
    #[arg(long, default_value_t = 8000)]
    port: u16,
    /// Key that clients have to bring (Authorization: Bearer)
    #[arg(long, env = "LORIMER_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Key for loading and dropping adapters
    #[arg(long, env = "LORIMER_ADMIN_KEY", hide_env_values = true)]
    admin_key: Option<String>,
    /// Certificate with its chain, a PEM file, to serve over TLS; read again when it changes
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Its private key, a PEM file
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Take adapters as files (POST /v1/adapters/NAME/upload, with the admin key where there is one) into the folder of adapters
    #[arg(long)]
    allow_uploads: bool,
    /// Memory for keys, values and adapters at work: 600MB, 4GiB, … [default: half of what the machine has free, 4 GiB at most]
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    pool: Option<u64>,
    /// Memory for adapters that are read and not at work
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes, default_value = "1GiB")]
    host_memory: u64,
    /// Most requests in the batch
    #[arg(long, default_value_t = 64, visible_alias = "max-num-seqs")]
    max_running: usize,
    /// Most token rows of a step
    #[arg(long, default_value_t = 512, visible_alias = "max-num-batched-tokens")]
    batch_tokens: usize,
    /// Most prompt tokens of one step while prompts of several clients wait, shared equally: how long one client's answers wait for another's
    /// prompt
    #[arg(long, default_value_t = 48)]
    shared_tokens: usize,
    /// Most tokens that are guessed of each answer in a step, from what followed the same tokens before, and kept where they are what is drawn: answers are
    /// the same, and faster where they repeat the prompt; 0 for none
    #[arg(long, value_name = "N", default_value_t = 0, visible_alias = "num-speculative-tokens")]
    guesses: usize,
    /// Draft model: a smaller base of the same tokenizer that guesses tokens of answers where --guesses finds none, kept where they are what is drawn: answers
    /// are the same, and faster if it is often right
    #[arg(long, value_name = "MODEL", visible_alias = "model-draft")]
    draft: Option<String>,
    /// Most tokens that the draft guesses of each answer in a step
    #[arg(long, value_name = "N", default_value_t = 4, requires = "draft")]
    draft_tokens: usize,
    /// How keys and values are kept in the pool
    #[arg(long, value_name = "DTYPE", value_enum, default_value_t)]
    kv_cache_dtype: KvCacheDtype,
    /// Most requests that wait; more are refused with 503
    #[arg(long, default_value_t = 1000)]
    max_waiting: usize,
    /// Largest rank that is served
    #[arg(long, default_value_t = 512, visible_alias = "max-lora-rank")]
    max_rank: usize,
    /// Rank of the low-rank form of methods that have none
    #[arg(long, default_value_t = 64)]
    conversion_rank: usize,
    /// Refuse requests whose first token would come later than so many seconds
    #[arg(long, value_name = "SECONDS")]
    first_token: Option<f64>,
    /// Do not keep keys and values of prompts for requests that begin alike
    #[arg(long)]
    no_prefix_cache: bool,
    /// Fetch an adapter that is not below the folder of adapters from the Hugging Face hub when it is asked for by its hub id (owner/name or
    /// owner/name@revision), into that folder
    #[arg(long)]
    allow_hub: bool,
    /// Disk space for adapters of the hub
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes, default_value = "10GiB", requires = "allow_hub")]
    hub_space: u64,
    /// Collector of OpenTelemetry that gets a span of each request, over HTTP (http://127.0.0.1:4318, without a path /v1/traces below it) [default:
    /// OTEL_EXPORTER_OTLP_TRACES_ENDPOINT, or OTEL_EXPORTER_OTLP_ENDPOINT]
    #[arg(long, value_name = "URL")]
    otlp_traces_endpoint: Option<String>,
    /// Print the OpenAPI document of the server, and serve nothing
    #[arg(long)]
    openapi: bool,
    /// Seconds for which the server is not ready (GET /readyz) and still serves when it is told to stop, until load balancers have seen it
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    drain: u64,
    /// Seconds that requests under way get when the server is told to stop
    #[arg(long, default_value_t = 30)]
    grace: u64,
}

/// Bytes of the pool of an encoder's engine, which answers nothing.
const ENCODER_POOL: u64 = 16 << 20;

/// The folder that mirrors an object store, where none is given.
fn adapter_cache(address: &str) -> PathBuf {
    use sha2::Digest;
    let hash: String = sha2::Sha256::digest(address).iter().take(8).map(|b| format!("{b:02x}")).collect();
    lorimer::model::pull::own_cache().join("adapters").join(hash)
}

impl Serve {
    pub fn run(self, global: Global) -> Result<ExitCode> {
        if self.openapi {
            println!("{}", http::document());
            return Ok(ExitCode::SUCCESS);
        }
        self.check()?;
        let address = http::address(&self.host, self.port).map_err(|e| anyhow!(e))?;
        let keys = Keys { api: self.api_key.clone(), admin: self.admin_key.clone() };
        keys.check(address.ip()).map_err(|e| anyhow!(e))?;
        let tls = self.tls_cert.as_deref().zip(self.tls_key.as_deref());
        let tls = tls.map(|(certificate, key)| Tls::read(certificate, key)).transpose().map_err(|e| anyhow!(e))?;
        let traces = TraceSettings::of(self.otlp_traces_endpoint.as_deref(), |name| std::env::var(name).ok());
        let traces = traces.map_err(|e| anyhow!(e))?;
        let scheme = if tls.is_some() { "https" } else { "http" };
        let (base, pulled) = common::open_base(&self.model, global)?;
        let embed = if base.model().shape().causal { None } else { Some(self.pooling.options(&base)?) };
        let base = Arc::new(base);
        let draft = self.draft(embed.is_some(), global)?;
        let store = match &self.adapters {
            None => None,
            Some(place) => Some(Arc::new(Store::open(self.store(place, &base)?)?)),
        };
        let settings = self.engine(embed.is_some())?;
        let geometry = |base: &Arc<Base>| Geometry::with(base.model().shape(), settings.kv_cache_dtype);
        let (geometry, drafts) = (geometry(&base), draft.as_ref().map(geometry));
        let pool_bytes = settings.pool_bytes;
        let [own, _] = shares(pool_bytes, geometry, drafts);
        let tokens = geometry.tokens_of_pages(own / geometry.page_bytes().max(1));
        let name = self.served_name.clone().unwrap_or_else(|| pulled.name.clone());
        if store.as_ref().is_some_and(|store| store.contains(&name)) {
            bail!("the adapter `{name}` has the base's own name; rename it, or the base with --served-model-name");
        }
        let worker = Worker::start_with_draft(base.clone(), draft, settings)?;
        let count = store.as_ref().map_or(0, |store| store.list().len());
        let app = App::embedding((base, embed), name.clone(), store, worker, keys, address.ip().is_loopback());
        if self.allow_uploads {
            app.allow_uploads();
        }
        if self.allow_hub {
            app.allow_hub(self.hub_space)?;
        }
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let stop = common::stop_flag();
        let ended = runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind(address).await;
            let listener = listener.with_context(|| format!("cannot listen at {address}; is another server there?"))?;
            let address = listener.local_addr()?;
            if let Some(traces) = traces {
                app.export_to(Exporter::start(traces).map_err(|e| anyhow!(e))?);
            }
            let megabytes = pool_bytes as f64 / 1e6;
            tracing::info!(
                "{count} adapters, a pool of {megabytes:.0} MB with room for {tokens} tokens in {}",
                geometry.dtype.name()
            );
            common::print(global, &serde_json::json!({ "url": format!("{scheme}://{address}") }), || {
                format!("{name} is served at {scheme}://{address}")
            })?;
            let stopped = async {
                while !stop.load(Ordering::Relaxed) {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            };
            let times = (Duration::from_secs(self.drain), Duration::from_secs(self.grace));
            http::serve(listener, app, tls, stopped, times).await?;
            Ok(ExitCode::SUCCESS)
        });
        // What is still read from a disk or an object store, which may never answer, is not waited for.
        runtime.shutdown_background();
        ended
    }

    /// The draft model, its weights kept as the base's are.
    fn draft(&self, encoder: bool, global: Global) -> Result<Option<Arc<Base>>> {
        let Some(model) = self.draft.clone() else { return Ok(None) };
        if encoder {
            bail!("--draft guesses tokens of answers, and an encoder answers nothing; leave it out");
        }
        let (draft, _) = common::open_base(&ModelArgs { model, tokenizer: None, ..self.model.clone() }, global)?;
        Ok(Some(Arc::new(draft)))
    }

    /// Refuses what cannot be.
    fn check(&self) -> Result<()> {
        if self.max_running == 0 || self.batch_tokens == 0 || self.shared_tokens == 0 {
            bail!("--max-running, --batch-tokens and --shared-tokens should be at least 1");
        }
        if self.allow_uploads && self.adapters.as_ref().is_none_or(|place| place.contains("://")) {
            bail!("--allow-uploads writes adapters into a folder; give one with --adapters");
        }
        if self.draft_tokens == 0 {
            bail!("--draft-tokens should be at least 1; leave --draft out to guess nothing");
        }
        if self.allow_hub && self.adapters.as_ref().is_none_or(|place| place.contains("://")) {
            bail!("--allow-hub puts adapters into a folder; give one with --adapters");
        }
        if self.first_token.is_some_and(|s| !(s.is_finite() && s > 0.0)) {
            bail!("--first-token should be above 0");
        }
        Ok(())
    }

    /// The store of adapters in a folder or an object store.
    fn store(&self, place: &str, base: &Base) -> Result<StoreSettings> {
        let address = place.contains("://").then(|| place.to_string());
        let root = match &address {
            Some(address) => self.adapter_cache.clone().unwrap_or_else(|| adapter_cache(address)),
            None => PathBuf::from(place),
        };
        let chat = ChatDefaults {
            bos: base.text.bos.clone().unwrap_or_default(),
            eos: base.text.eos.clone().unwrap_or_default(),
            template: base.text.template_source().map(str::to_string),
        };
        Ok(StoreSettings {
            address,
            host_bytes: usize::try_from(self.host_memory)?,
            max_rank: self.max_rank,
            conversion_rank: self.conversion_rank,
            chat: Some(chat),
            base: Some(BaseRecord::of(&base.path, &base.model().shape().layers)?),
            ..StoreSettings::new(root)
        })
    }

    fn engine(&self, encoder: bool) -> Result<EngineSettings> {
        // An encoder keeps nothing from one request to the next.
        let most = if encoder { ENCODER_POOL } else { 4 << 30 };
        let free = free_memory().map_or(1 << 30, |free| free / 2).min(most);
        Ok(EngineSettings {
            pool_bytes: usize::try_from(self.pool.unwrap_or(free))?,
            policy: Policy {
                max_running: self.max_running,
                batch_tokens: self.batch_tokens,
                shared_tokens: self.shared_tokens,
                guesses: self.guesses,
                draft_tokens: self.draft_tokens,
                max_waiting: self.max_waiting,
                first_token: self.first_token,
                ..Default::default()
            },
            prefix_cache: !self.no_prefix_cache,
            kv_cache_dtype: self.kv_cache_dtype.into(),
        })
    }
}
