/*-------------------------------------------------------------------------
 *
 * guc.h
 *	  Settings of pg_redrive.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_GUC_H
#define REDRIVE_GUC_H

extern bool redrive_enabled;
extern int	redrive_max_databases;
extern int	redrive_max_workers;
extern int	redrive_pass_time_budget;	/* seconds */
extern int	redrive_worker_idle_timeout;	/* milliseconds */

extern void redrive_define_settings(bool preloading);

#endif							/* REDRIVE_GUC_H */
