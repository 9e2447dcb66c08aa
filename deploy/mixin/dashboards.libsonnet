{
  local c = $._config,
  local datasource = { type: 'prometheus', uid: '${datasource}' },
  local target(expr, legend) = { datasource: datasource, expr: expr, legendFormat: legend },

  local panel(kind, title, unit, targets, description) = {
    type: kind,
    title: title,
    description: description,
    datasource: datasource,
    fieldConfig: { defaults: { unit: unit, min: 0 }, overrides: [] },
    targets: std.mapWithIndex(function(i, t) t { refId: std.char(65 + i) }, targets),
  },
  local graph(title, unit, targets, description='') = panel('timeseries', title, unit, targets, description) {
    options: { legend: { displayMode: 'list', placement: 'bottom' }, tooltip: { mode: 'multi' } },
  },
  local stat(title, unit, targets, description='') = panel('stat', title, unit, targets, description) {
    options: { reduceOptions: { calcs: ['lastNotNull'] }, colorMode: 'none', graphMode: 'area' },
  },

  // Classic buckets: they are there whatever the server makes of native ones.
  local quantiles(metric, by, selector, legend) = [
    target('histogram_quantile(%s, sum by (%s, le) (rate(%s_bucket{%s}[$__rate_interval])))' % [q, by, metric, selector],
           'p%d %s' % [q * 100, legend])
    for q in [0.5, 0.99]
  ],
  local rate(metric, by, selector) = 'sum by (%s) (rate(%s{%s}[$__rate_interval]))' % [by, metric, selector],

  local node = '%s, node=~"$node"' % c.nodeSelector,
  local manager = c.managerSelector,

  local rows = [
    {
      title: 'Cluster',
      panels: [
        stat('Nodes', 'short', [target('sum by (status) (warren_nodes_total{%s})' % manager, '{{status}}')]),
        stat('Services', 'short', [target('max(warren_services_total{%s})' % manager, 'services')]),
        stat('Containers', 'short', [target('sum by (state) (warren_containers_total{%s})' % manager, '{{state}}')]),
        stat('Waiting for a node', 'short', [target('max(warren_scheduling_pending{%s})' % manager, 'pending')]),
      ],
    },
    {
      title: 'Containers, timed in the kernel',
      panels: [
        graph(
          o.title, 's', quantiles('warren_container_%s_duration_seconds' % o.name, 'node', node, '{{node}}'), o.description
        )
        for o in [
          { name: 'create', title: 'Create', description: "From the execution of the runtime's create to its exit." },
          { name: 'start', title: 'Start', description: "From the execution of the runtime's start to the container's own first instruction." },
          { name: 'stop', title: 'Stop', description: 'From the first stop signal to the end of the last process.' },
        ]
      ] + [
        graph('Phases, median', 's', [
          target('histogram_quantile(0.5, sum by (phase, le) (rate(warren_container_phase_duration_seconds_bucket{%s}[$__rate_interval])))' % node, '{{phase}}'),
        ], "What a container's way to running consists of."),
        graph('Ends', 'cps', [
          target(rate('warren_container_exits_total', 'reason', node), '{{reason}}'),
          target(rate('warren_container_start_failures_total', 'reason', node), 'failed {{reason}}'),
        ]),
        graph('Stops that waited', 'cps', [
          target(rate('warren_container_sigterm_ignored_total', 'node', node), 'signal ignored, {{node}}'),
          target(rate('warren_container_stop_escalations_total', 'node', node), 'killed, {{node}}'),
        ]),
        graph('Replacements', 'cps', [target(rate('warren_container_restarts_total', 'service', manager), '{{service}}')]),
        graph('From needed to placed', 's', quantiles('warren_scheduling_latency_seconds', 'instance', manager, '')),
      ],
    },
    {
      title: 'DNS, seen in the kernel',
      panels: [
        graph('Queries', 'reqps', [target(rate('warren_dns_queries_total', 'service, rcode', node), '{{service}} {{rcode}}')]),
        graph('Duration', 's', quantiles('warren_dns_query_duration_seconds', 'service', node, '{{service}}')),
        graph('Failures', 'reqps', [target(rate('warren_dns_failures_total', 'service, reason', node), '{{service}} {{reason}}')]),
        graph('Retransmissions', 'pps', [
          target(rate('warren_dns_retransmits_total', 'node', node), 'again, {{node}}'),
          target(rate('warren_dns_unmatched_responses_total', 'node', node), 'unmatched, {{node}}'),
        ]),
      ],
    },
    {
      title: 'Control plane',
      panels: [
        graph('API calls', 'reqps', [target(rate('warren_api_requests_total', 'method, status', manager), '{{method}} {{status}}')]),
        graph('API duration, p99', 's', [
          target('histogram_quantile(0.99, sum by (method, le) (rate(warren_api_request_duration_seconds_bucket{%s}[$__rate_interval])))' % manager, '{{method}}'),
        ]),
        graph('Commit', 's', quantiles('warren_raft_commit_duration_seconds', 'instance', manager, '{{instance}}'), 'From proposal to reply.'),
        graph('Log sync', 's', quantiles('warren_raft_log_sync_duration_seconds', 'instance', manager, '{{instance}}'), 'The disk.'),
        graph('Raft log', 'short', [
          target('warren_raft_log_index{%s}' % manager, 'last, {{instance}}'),
          target('warren_raft_applied_index{%s}' % manager, 'applied, {{instance}}'),
        ]),
        graph('Leader and sessions', 'short', [
          target('warren_raft_is_leader{%s}' % manager, 'leads, {{instance}}'),
          target('warren_agent_sessions{%s}' % manager, 'sessions, {{instance}}'),
        ]),
      ],
    },
    {
      title: 'Warren itself',
      panels: [
        graph('Memory', 'bytes', [
          target('process_resident_memory_bytes{%s}' % s, '{{job}} {{instance}}')
          for s in [manager, c.agentSelector]
        ]),
        graph('CPU', 'percentunit', [
          target('rate(process_cpu_seconds_total{%s}[$__rate_interval])' % s, '{{job}} {{instance}}')
          for s in [manager, c.agentSelector]
        ]),
        graph('Lost by probes', 'cps', [
          target(rate('warren_probe_events_lost_total', 'node, probe, reason', node), '{{node}} {{probe}} {{reason}}'),
        ]),
        graph('Age of telemetry', 's', [target('warren_telemetry_age_seconds{%s}' % manager, '{{node}}')]),
      ],
    },
  ],

  // Four panels a line; Grafana's grid has 24 columns.
  local width = 6,
  local height = 8,
  local lines(n) = std.ceil(n / (24 / width)),
  local laid = std.foldl(
    function(state, row) {
      y: state.y + 1 + lines(std.length(row.panels)) * height,
      panels: state.panels
              + [{ type: 'row', title: row.title, collapsed: false, gridPos: { x: 0, y: state.y, w: 24, h: 1 }, panels: [] }]
              + std.mapWithIndex(
                function(i, p) p {
                  gridPos: {
                    x: (i % (24 / width)) * width,
                    y: state.y + 1 + std.floor(i / (24 / width)) * height,
                    w: width,
                    h: height,
                  },
                },
                row.panels
              ),
    },
    rows,
    { y: 0, panels: [] }
  ),

  grafanaDashboards+:: {
    'warren.json': {
      uid: c.dashboardUid,
      title: 'Warren',
      tags: ['warren'],
      schemaVersion: 39,
      editable: true,
      refresh: c.dashboardRefresh,
      time: { from: 'now-1h', to: 'now' },
      templating: {
        list: [
          { name: 'datasource', type: 'datasource', query: 'prometheus' },
          {
            name: 'node',
            type: 'query',
            datasource: datasource,
            query: 'label_values(warren_probe_up{%s}, node)' % c.nodeSelector,
            refresh: 2,
            multi: true,
            includeAll: true,
          },
        ],
      },
      panels: std.mapWithIndex(function(i, p) p { id: i + 1 }, laid.panels),
    },
  },
}
