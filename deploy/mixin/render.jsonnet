// Every file that is rendered, by its path below deploy/: a text as it is, anything else as JSON.
local mixin = import 'mixin.libsonnet';
{
  'prometheus/alerts.yaml':
    '# Rendered from deploy/mixin: `cargo xtask mixin`.\n' + std.manifestYamlDoc(mixin.prometheusAlerts, quote_keys=false) + '\n',
} + {
  ['grafana/' + name]: mixin.grafanaDashboards[name]
  for name in std.objectFields(mixin.grafanaDashboards)
}
