/*-------------------------------------------------------------------------
 *
 * utility.h
 *	  Commands that need a database to themselves.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_UTILITY_H
#define REDRIVE_UTILITY_H

extern void redrive_install_utility_hook(void);

#endif							/* REDRIVE_UTILITY_H */
